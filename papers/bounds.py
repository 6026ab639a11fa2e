"""papers/bounds.py: what a value may be; one check for flags, options of bridges and JSON files.

    check_value("--lr", math.nan, float, above=0)       ValueError: --lr is nan, not a number above 0.
    OPTIONS                                             the bounds of the bridges' options
    UNREAD["visualgpt"]                                 which of them nobody reads beside which others
    nearest("qfomer", ALL_BRIDGES)                      did you mean "qformer"? Known: linear, mlp, …
"""
from __future__ import annotations

import difflib

LARGEST = {int: 2**63 - 1, float: 3.4e38}               # int64, float32: what is beyond cannot be computed
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list",
         dict: "an object"}
SIZE = dict(least=1, most=2**20)                        # of a width, a vocabulary, a number of tokens
LAYERS = dict(least=1, most=400)
OPTIONS = {     # an option, of all bridges or of one → its bounds; every other whole number is a SIZE
    **dict.fromkeys(("layers", "depth", "every", "cross_every", "levels"), LAYERS),
    **dict.fromkeys(("heads", "resampler_heads"), dict(least=1, most=1000)),
    **dict.fromkeys(("first", "adapted"), dict(least=0, most=1000)),
    **dict.fromkeys(("vocab", "times", "qformer.queries", "idefics.latents"), dict(least=0, most=2**20)),
    "middle": dict(least=0, most=1000),
    "reads": dict(least=-1000, most=1000),              # a layer of the ViT, negative from the last one
    "version": dict(least=0, most=3),
    "dropout": dict(least=0, below=1),
    "pairs": dict(least=0, most=1),                     # a share
    **dict.fromkeys(("distance", "contrast"), dict(least=0, most=1000)),                # weights of losses
    "tau": dict(least=0, below=0.5),
    "vision_eps": dict(above=0, most=1),
}
# a bridge → an option of it → (another one, its values) of which all hold where nobody reads the first; none:
# always. "the loss" is no option: a recipe may train a bridge by another loss than the bridge's own.
BLIND, OTHER_LOSS = {"image": (False,)}, {"the loss": ("another recipe's",)}
NO_EXPERTS = {"attention": (False,), "mlp": (False,)}
UNREAD: dict[str, dict[str, dict[str, tuple]]] = {
    "every bridge": {"reads_cls": {"reads": ("pooled",)}},
    "qformer": {"vocab": {}, "positions": {"vocab": (0,)}},     # the recipe blip2-1 counts the words itself
    "zero_init": dict.fromkeys(("reads", "reads_cls"), {"version": (0,)}),
    "idefics": dict.fromkeys(("depth", "resampler_heads", "resampler_head_width", "resampler_qk_norm"),
                             {"latents": (0,)}),
    "magma": dict.fromkeys(("factor", "adapter_norm"), {"mlp": ("none",), "attention": ("none",)}),
    "cogvlm": {"bias": {"attention": (False,)}, "every": NO_EXPERTS, "copied": NO_EXPERTS},
    "prompt_tuning": {"reads": BLIND, "reads_cls": BLIND},
    "prefix_tuning": {"reads": BLIND, "reads_cls": BLIND, "hidden": {"network": (False,)}},
    "visualgpt": {"tau": {"mix": ("residual", "tanh")}},
    "fromage": {"pairs": OTHER_LOSS},                   # its sizes are read: DPO goes on from such a run
    "vlkd": dict.fromkeys(("distance", "contrast"), OTHER_LOSS),
}


def nearest(wrong: str, known) -> str:
    """The end of a message about an unknown name: the most similar known one, then all of them."""
    near = difflib.get_close_matches(wrong, known, 1)
    return (f'did you mean "{near[0]}"? ' if near else "") + f"Known: {', '.join(known)}."


def check_value(name: str, value, kind: type, least: float | None = None, most: float | None = None,
                above: float | None = None, below: float | None = None):
    """The value, if it is of its kind (int | float | bool | str | list | dict) and within its bounds.

    A number is finite: NaN and infinities are within no bounds. True is no number, 1 is a float, 1.0 no int.
    Else a ValueError of one sentence that begins with the name.
    """
    right = isinstance(value, (int, float) if kind is float else kind)
    if kind in LARGEST:
        right = right and not isinstance(value, bool) and -LARGEST[kind] <= value <= LARGEST[kind]
        right = right and (least is None or value >= least) and (most is None or value <= most)
        right = right and (above is None or value > above) and (below is None or value < below)
    if not right:
        if kind in LARGEST and type(value) in (int, float) and abs(value) > LARGEST[kind]:
            most = most or LARGEST[kind]                # what it may be at all
        bounds = {"of at least": least, "above": above, "of at most": most, "below": below}
        limits = " and ".join(f"{word} {limit:,}" for word, limit in bounds.items() if limit is not None)
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
        raise ValueError(f"{name} is {shown:.60}, not {KINDS[kind]} {limits}".rstrip() + ".")
    return value


def check_option(bridge: str, name: str, value, annotation: str) -> None:
    """A ValueError unless the value is what the annotation of a bridge's argument says, within OPTIONS."""
    kind = {k.__name__: k for k in KINDS}.get(annotation.removesuffix(" | None"))
    if kind and not (value is None and annotation.endswith(" | None")):
        bounds = OPTIONS.get(f"{bridge}.{name}") or OPTIONS.get(name, SIZE if kind is int else {})
        check_value(f"{bridge}'s option {name}", value, kind, **bounds)


def unread_where(bridge: str, option: str, chosen: dict) -> dict | None:
    """The chosen values of other options beside which nobody reads this one, by UNREAD; None: it is read."""
    for table in (UNREAD["every bridge"], UNREAD.get(bridge, {})):
        where = table.get(option)
        if where is not None and all(chosen[key] in values for key, values in where.items()):
            return {key: chosen[key] for key in where}
    return None
