"""papers: one paper, one file; every bridge by its name, the six of bridges.py and their relatives here.

A new paper touches three places: its file, its name in this one, its test in tests/papers/.
"""
from __future__ import annotations

import inspect

from bridges import BRIDGES, ZeroInit, ZeroInitV2
from model import Bridge, DecoderConfig, nearest
from papers.clipcap import ClipCap, ClipCapTransformer
from papers.frozen import Frozen
from papers.idefics import Idefics
from papers.llama_adapter import ZeroInitV1

ALL_BRIDGES: dict[str, type[Bridge]] = {**BRIDGES, **{b.name: b for b in (Frozen, Idefics, ClipCap, ClipCapTransformer)}}
VERSIONS = {"zero_init": {0: ZeroInit, 1: ZeroInitV1, 2: ZeroInitV2}}           # --option version=1


def make_bridge(name: str, decoder: DecoderConfig | None, vision_width: int, **options) -> Bridge:
    """A bridge by name; options are the keyword arguments of its class, and reads, reads_cls and (of
    zero_init) version.

    An option of another version is accepted and has no effect. Raises ValueError for an unknown name, option
    or version; the sentence names the nearest known one.
    """
    if name not in ALL_BRIDGES:
        raise ValueError(f'unknown bridge "{name}"; {nearest(name, ALL_BRIDGES)}')
    versions = VERSIONS.get(name, {})
    version = options.get("version", max(versions, default=None))
    if versions and version not in versions:
        *first, last = versions
        raise ValueError(f"{name} has version {', '.join(map(str, first))} and {last}, not {version!r}.")
    kind = versions.get(version, ALL_BRIDGES[name])
    own = list(inspect.signature(kind).parameters)[2:]
    others = [key for other in versions.values() for key in list(inspect.signature(other).parameters)[2:]]
    known = dict.fromkeys([*own, *others, *["version"] * bool(versions), "reads", "reads_cls"])
    for key in options:
        if key not in known:
            raise ValueError(f'{name} has no option "{key}"; {nearest(key, known)}')
    bridge = kind(decoder, vision_width, **{key: value for key, value in options.items() if key in own})
    for key in ("reads", "reads_cls"):
        if key in options:
            setattr(bridge, key, options[key])
    bridge.options = dict(options)
    return bridge


from papers import blip2_stage1, clip, clipcap, frozen, idefics, llama_adapter, llava_data, mllama      # noqa: E402

PAPERS = {module.__name__.removeprefix("papers."): module
          for module in (blip2_stage1, clip, clipcap, frozen, idefics, llama_adapter, llava_data, mllama)}
