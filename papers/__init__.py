"""papers: every bridge by its name, the six of bridges.py and their relatives."""
from __future__ import annotations

from bridges import Flamingo, Linear, MAPL, MLP, QFormer, ZeroInit
from model import Bridge, DecoderConfig
from papers.frozen import Frozen
from papers.idefics import Idefics
from model import nearest

ALL_BRIDGES: dict[str, type[Bridge]] = {b.name: b for b in (Linear, MLP, Frozen, MAPL, QFormer, ZeroInit, Flamingo, Idefics)}


def make_bridge(name: str, decoder: DecoderConfig, vision_width: int, **options) -> Bridge:
    """A bridge by name; options are the keyword arguments of its class, plus reads and reads_cls. Unknown ones are refused."""
    import inspect
    if name not in ALL_BRIDGES:
        raise ValueError(f'unknown bridge "{name}"; {nearest(name, ALL_BRIDGES)}')
    known = [*list(inspect.signature(ALL_BRIDGES[name]).parameters)[2:], "reads", "reads_cls"]
    for key in options:
        if key not in known:
            raise ValueError(f'{name} has no option "{key}"; {nearest(key, known)}')
    reads = {k: v for k, v in options.items() if k in ("reads", "reads_cls")}
    bridge = ALL_BRIDGES[name](decoder, vision_width, **{k: v for k, v in options.items() if k not in reads})
    for key, value in reads.items():
        setattr(bridge, key, value)
    bridge.options = dict(options)
    return bridge
