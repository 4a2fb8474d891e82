"""Other people's losses, called K times with the softmaxes they need. Installed ones are measured, others are named.

Nothing is imported before a case asks for it, and nothing here is a dependency: `pip install "mtkd_fast[peers]"`.
"""

from . import fla, liger, quack, torchdistill, torchtune, trl
from .peer import Peer

ALL: tuple[Peer, ...] = (liger.PEER, fla.PEER, quack.PEER, torchdistill.PEER, torchtune.PEER, trl.PEER)
