"""Numbers of several splits, as mean ± standard deviation."""

import statistics


def mean_and_spread(values) -> dict:
    values = list(values)
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": sd, "values": values}


def plus_minus(x: dict, digits: int) -> str:
    return f"{x['mean']:.{digits}f}" + ("" if x["sd"] is None else f" ± {x['sd']:.{digits}f}")
