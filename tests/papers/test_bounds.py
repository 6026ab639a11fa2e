"""An option of a bridge is refused where nobody reads it beside the others, and nowhere else."""
from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch

from conftest import SMALL, TINY, TINY_VIT, stir, tiny_decoder
from model import IMAGE, VLM, DecoderConfig, ViT
import train
from papers import ALL_BRIDGES, VERSIONS, arguments, make_bridge, refuse_unread_options
from papers.bounds import OPTIONS, UNREAD
from papers.magma import FORMS
from papers.vcgpt import FUSE
from papers.visualgpt import MIXTURES
from support.formats.files import UserError
from support.lab.claims import ARMS

WORDS = {"mlp": FORMS, "attention": FORMS, "mix": MIXTURES, "fuse": FUSE, "act": ("gelu", "relu"),
         "gate_per": ("head", "layer"), "gate_init": ("zero", "random"), "reads": (-1, -2, "pooled"),
         "vocab": (0, 50), "mapper": ("mapl", "qformer")}
# another value of a number, where one more than it is none that fits the tiny sizes
OTHERS = {"reads": -3, "heads": 1, "resampler_heads": 1, "resampler_head_width": 6, "head_width": 6,
          "adapted": 2, "tau": 0.4, "dropout": 0.5, "pairs": 0.25, "vision_eps": 0.1, "width": 32, "join": 3,
          "stride": 3, "hidden": 20, "cross_every": 3, "times": 2}
TASKS = {"fromage": "pairs", "vlkd": "weights"}         # what the loss of a bridge's own reads of it
torch.manual_seed(0)
VIT, DECODER = stir(ViT(TINY_VIT)).requires_grad_(False), tiny_decoder()
PIXELS, BOXES = torch.randn(3, 3, 24, 24), torch.tensor([[0.1, 0.2, 0.5, 0.9]] * 3)


def options_of(name: str) -> dict[str, str]:
    """Every option of a bridge with its annotation, those of all its versions."""
    kinds = VERSIONS.get(name, {0: ALL_BRIDGES[name]})
    found = {key: a for kind in kinds.values() for key, a in arguments(kind).items()}
    return found | {"reads": "int", "reads_cls": "bool"} | ({"version": "int"} if name in VERSIONS else {})


def values(name: str, option: str, annotation: str) -> list:
    """The values by which an option may switch parts of its bridge on or off."""
    if annotation == "bool":
        return [False, True]
    if (name, option) == ("gligen", "reads"):           # its own loss refuses it: the option layers says it
        return []
    if option in WORDS and (annotation == "str" or option in ("reads", "vocab")):
        return [*WORDS[option]]
    if option == "version":
        return [*VERSIONS[name]]
    bounds = OPTIONS.get(f"{name}.{option}") or OPTIONS.get(option, {})
    return [0] if bounds.get("least") == 0 else [None] if annotation.endswith("None") else []


@functools.lru_cache
def features(reads: int | str, cls: bool) -> torch.Tensor:
    return VIT.features(PIXELS, reads, cls)


def make(name: str, options: dict):
    torch.manual_seed(1)
    bridge = make_bridge(name, TINY, TINY_VIT.width, **options)
    bridge.adopt(DECODER)
    return bridge


def behaviour(name: str, options: dict) -> list | None:
    """What an option can change: parameters as they begin, which of them learn, outputs, what a loss reads.

    None: the values do not fit each other, which a sentence says.
    """
    try:
        bridge = make(name, options)
        begins = {key: p.clone() for key, p in bridge.state_dict().items()}
        learns = [p.requires_grad for p in bridge.parameters()]
        vlm = VLM(VIT, stir(bridge, 2), DECODER, image_token=None).train()
        tokens = torch.tensor([[3, IMAGE, 4, 5, 7], [6, 5, IMAGE, 8, 2]])
        if name not in ("zero_init", "prefix_tuning"):  # which take one picture per text
            tokens[0, 3] = IMAGE
        torch.manual_seed(3)
        with torch.no_grad():
            seen = features(bridge.reads, bridge.reads_cls)[:int((tokens == IMAGE).sum())]
            out = [vlm(tokens, features=seen)]
            if name == "gligen":
                out.append(bridge.grounded_features(VIT, PIXELS, BOXES, DECODER.embed.weight[0]))
            if hasattr(bridge, "writer"):               # its words are the nearest ones: mostly the same
                out.append(bridge.writer.soft(bridge.writer.mapper.see(seen)))
    except ValueError:
        return None
    return [begins, learns, out, getattr(bridge, TASKS.get(name, ""), None)]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def refused(name: str, options: dict, option: str, task: str | None = None) -> bool:
    try:
        refuse_unread_options(make(name, options), {option: options[option]}, task or name)
    except ValueError as e:
        assert str(e).startswith(f"{name} does not read {option}") and str(e).endswith("; leave it out.")
        return True
    return False


def another(option: str, value):
    if isinstance(value, bool):
        return not value
    if option in WORDS and isinstance(value, str):
        return next(other for other in WORDS[option] if other != value)
    if option == "version":
        return (value + 1) % 4
    other = OTHERS.get(option, 1 if value is None else value + 1)
    return other if other != value else value + 1


def settings(name: str, known: dict, base: dict, pairs: bool) -> list[dict]:
    """Beside which values options are tried: each that switches something, those of UNREAD; all pairs."""
    switches = [(key, v) for key, a in known.items() for v in values(name, key, a) if v != base[key]]
    several = [dict(zip(where, each)) for where in UNREAD.get(name, {}).values() if "the loss" not in where
               for each in itertools.product(*where.values())]
    found = [{}, *({key: v} for key, v in switches), *several]
    found += [dict(pair) for pair in itertools.combinations(switches, 2)] if pairs else []
    return [base | each for n, each in enumerate(found) if each not in found[:n]]


@pytest.mark.parametrize("pairs", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL_BRIDGES)
def test_an_option_is_refused_where_it_changes_nothing_and_nowhere_else(name, pairs):
    kind, known = ALL_BRIDGES[name], options_of(name)
    base = {key: p.default for each in VERSIONS.get(name, {0: kind}).values()
            for key, p in inspect.signature(each).parameters.items() if key in known}
    base |= {"reads": make(name, SMALL[name]).reads, "reads_cls": kind.reads_cls, **SMALL[name]}
    base |= {"version": 2} if name in VERSIONS else {}
    always = {key for key, where in UNREAD.get(name, {}).items() if where == {}}
    read = set()
    for options in settings(name, known, base, pairs):
        plain = behaviour(name, options)
        for option in known.keys() - always if plain else ():
            changed = options | {option: another(option, options[option])}
            found = behaviour(name, changed)
            if found:
                same = equal(plain, found)
                if option == "heads" and options["reads"] == "pooled":
                    continue                            # the weight of one key is 1, however many heads
                read |= set() if same else {option}
                assert same == refused(name, changed, option), (options, option)
    assert read == known.keys() - always                # every option does something somewhere


def build(*flags: str):
    """The bridge of a command line, beside a decoder of 30 layers."""
    s = train.settings_from(flags)[0]
    with torch.device("meta"):
        return train.new_bridge(s, s.bridge or train.RECIPES[s.recipe].bridge, DecoderConfig(layers=30), 128)


@pytest.mark.parametrize("flags, sentence", [
    ("--bridge visualgpt --option mix=residual tau=0.4",
     "--option: visualgpt does not read tau where mix is residual; leave it out."),
    ("--bridge magma --option mlp=none factor=8 adapter_norm=true",
     "--option: magma does not read adapter_norm, factor where mlp is none and attention is none; leave them "
     "out."),
    ("--recipe magma-tuned --option factor=8", "not read factor where mlp is none and attention is none;"),
    ("--bridge idefics --option latents=0 depth=3 resampler_heads=2",
     "idefics does not read depth, resampler_heads where latents is 0; leave them out."),
    ("--bridge cogvlm --option attention=false bias=true", "not read bias where attention is false;"),
    ("--recipe cogvlm-tuned --option every=2", "not read every where attention is false and mlp is false;"),
    ("--bridge prompt_tuning --option image=false reads=-3", "not read reads where image is false;"),
    ("--bridge fromage --option reads_cls=true", "fromage does not read reads_cls where reads is pooled;"),
    ("--bridge qformer --option positions=77", "qformer does not read positions where vocab is 0;"),
    ("--bridge qformer --option vocab=50", "qformer does not read vocab; leave it out."),
    ("--bridge zero_init --option version=0 reads=-3", "zero_init does not read reads where version is 0;"),
    ("--bridge zero_init --option hidden=8", "zero_init does not read hidden where version is 2;"),
    ("--recipe zero_init --scale paper --option depth=2", "not read depth where version is 1;"),
    ("--recipe mlp --bridge fromage --option pairs=0", "not read pairs where the loss is another recipe's;"),
    ("--recipe mlp --bridge vlkd --option contrast=0", "not read contrast where the loss is another"),
])
def test_one_sentence_names_both_options(flags, sentence):
    with pytest.raises(UserError) as e:
        build(*flags.split())
    assert sentence in str(e.value) and str(e.value).startswith("--option: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("flags", ["--bridge fromage --option joint=12",
                                   "--bridge gligen --option heads=2 cross=true"])
def test_what_goes_on_from_a_run_takes_the_sizes_of_its_bridge(flags):
    bridge = build("--recipe", "dpo", *flags.split())
    assert bridge.options.items() >= train.parse_options(flags.split("--option ")[1].split()).items()


def test_the_options_of_the_claims_are_read():
    tried = [arm.flags for arm in ARMS.values() if "--option" in arm.flags]
    assert len(tried) > 20
    for flags in tried:
        build(*flags)
