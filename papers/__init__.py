"""papers: every bridge by its name, the six of bridges.py and their relatives."""
from __future__ import annotations

from bridges import Flamingo, Linear, MAPL, MLP, QFormer, ZeroInit
from model import Bridge, DecoderConfig
from papers.frozen import Frozen
from papers.idefics import Idefics
from support.formats.files import UserError, nearest

ALL_BRIDGES: dict[str, type[Bridge]] = {b.name: b for b in (Linear, MLP, Frozen, MAPL, QFormer, ZeroInit, Flamingo, Idefics)}


def make_bridge(name: str, decoder: DecoderConfig, vision_width: int, **options) -> Bridge:
    """A bridge by name; options are the keyword arguments of its class, plus reads_layer and reads_cls. Unknown ones are refused."""
    import inspect
    if name not in ALL_BRIDGES:
        raise UserError(f'unknown bridge "{name}"; {nearest(name, ALL_BRIDGES)}')
    known = [*list(inspect.signature(ALL_BRIDGES[name]).parameters)[2:], "reads_layer", "reads_cls"]
    for key in options:
        if key not in known:
            raise UserError(f'{name} has no option "{key}"; {nearest(key, known)}')
    reads = {k: v for k, v in options.items() if k.startswith("reads_")}
    bridge = ALL_BRIDGES[name](decoder, vision_width, **{k: v for k, v in options.items() if k not in reads})
    for key, value in reads.items():
        setattr(bridge, key, value)
    bridge.options = dict(options)
    return bridge
