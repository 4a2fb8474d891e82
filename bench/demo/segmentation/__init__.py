"""The demo's third page: dense prediction, where every pixel is a row and the classes come before the pixels."""
