"""papers: one paper, one file; every bridge by its name, the six of bridges.py and their relatives here.

A new paper touches three places: its file, its name in this one, its test in tests/papers/.
"""
from __future__ import annotations

import inspect

from bridges import BRIDGES, ZeroInit, ZeroInitV2
from model import Bridge, DecoderConfig
from papers import (albef, albef_task, blip2_stage1, chameleon, chameleon_task, clip, clipcap, cm3, coca,
                    coca_task, cogvlm, contrasts, dalle, ddpm, dpo, dvae, flava, flava_task, fromage,
                    frozen, glide, glide_task, gligen, idefics, kosmos1, limber, llama_adapter, llava_data,
                    magic, magma, minigpt4, mllama, pica, ppo, prompt_tuning, round_robin, short, simvlm,
                    socratic, systems, told_task, unified_io2, unit, vcgpt, vilbert, vilt, visualbert,
                    visualgpt, vlkd, vq, word)
from papers.bounds import check_option, nearest, unread_where
from papers.clipcap import ClipCap, ClipCapTransformer
from papers.cogvlm import CogVLM
from papers.fromage import Fromage
from papers.frozen import Frozen
from papers.gligen import Gligen
from papers.gligen_task import GligenTask
from papers.idefics import Idefics
from papers.kosmos1 import Kosmos1
from papers.limber import Limber
from papers.llama_adapter import OneSoftmax, ZeroInitV1
from papers.magma import Magma
from papers.minigpt4 import MiniGPT4, MiniGPT4Llama2
from papers.prompt_tuning import PrefixTuning, PromptTuning
from papers.told import Told, ToldFlamingo
from papers.vcgpt import VCGPT
from papers.visualgpt import VisualGPT
from papers.vlkd import Vlkd

PAPERS = {module.__name__.removeprefix("papers."): module
          for module in (clip, blip2_stage1, frozen, idefics, mllama, llama_adapter, llava_data, clipcap,
                         pica, magic, socratic, limber, magma, minigpt4, kosmos1, fromage, cogvlm, dvae,
                         short, dalle, chameleon, ddpm, glide, prompt_tuning, visualgpt, vcgpt, gligen, vlkd,
                         dpo, ppo, vq, visualbert, vilbert, vilt, unit, coca, simvlm, cm3, contrasts, albef,
                         unified_io2, flava, round_robin)}
RECIPES = {**systems.RECIPES, **word.RECIPES, **told_task.RECIPES,      # of several stages, and of each paper
           **{name: recipe for paper in PAPERS.values()
              for name, recipe in getattr(paper, "RECIPES", {}).items()}}
RELATIVES = (Frozen, Idefics, ClipCap, ClipCapTransformer, Limber, Magma, MiniGPT4, MiniGPT4Llama2, Kosmos1,
             Fromage, CogVLM, PromptTuning, PrefixTuning, VisualGPT, VCGPT, Vlkd, Gligen, Told,
             ToldFlamingo)
ALL_BRIDGES: dict[str, type[Bridge]] = {**BRIDGES, **{bridge.name: bridge for bridge in RELATIVES}}
# task of a recipe → what it changes of train.py's answer task
ANSWER_TASKS = {"fromage": fromage.FromageTask, "vlkd": vlkd.VlkdTask, "gligen": GligenTask, **dpo.TASKS,
                **short.TASKS, **round_robin.TASKS, "word": word.WordTask, "told-1": told_task.ToldTask}
# task of a recipe that changes none of the answer task → its class
TASKS = {"stage1": blip2_stage1.Stage1Task,
         **{name: task for module in (clip, limber, visualbert, vilbert, vilt, albef_task, coca_task, simvlm,
                                      cm3, vq, dvae, dalle, chameleon_task, glide_task, flava_task)
            for name, task in module.TASKS.items()}}
VERSIONS = {"zero_init": {0: ZeroInit, 1: ZeroInitV1, 2: ZeroInitV2, 3: OneSoftmax}}


def arguments(kind: type[Bridge]) -> dict[str, str]:
    """The options of a class of bridges, each with its annotation."""
    return {p.name: p.annotation for p in list(inspect.signature(kind).parameters.values())[2:]}


def make_bridge(name: str, decoder: DecoderConfig | None, vision_width: int, /, **options) -> Bridge:
    """A bridge by name; options are the keyword arguments of its class, and reads, reads_cls and (of
    zero_init) version.

    vision_width: Di of the ViT; a list of layers in `reads` multiplies it by their number. An option that
    is not read beside the others has no effect here. Raises ValueError for an unknown name, option or version
    (the sentence names the nearest known one) and for a value that papers/bounds.py refuses.
    """
    if name not in ALL_BRIDGES:
        raise ValueError(f'unknown bridge "{name}"; {nearest(name, ALL_BRIDGES)}')
    versions = VERSIONS.get(name, {})
    usual = next((v for v, kind in versions.items() if kind is ALL_BRIDGES[name]), None)
    version = options.get("version", usual)
    if versions and version not in [*versions]:
        *first, last = versions
        raise ValueError(f"{name} has version {', '.join(map(str, first))} and {last}, not {version!r}.")
    kind = versions[version] if versions else ALL_BRIDGES[name]
    own = arguments(kind)
    known = {key: a for other in (*versions.values(), kind) for key, a in arguments(other).items()}
    known |= {"version": "int"} if versions else {}
    known |= {"reads": "" if options.get("reads") == "pooled" else "int", "reads_cls": "bool"}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f'{name} has no option "{key}"; {nearest(key, known)}')
        several = key == "reads" and isinstance(value, list) and value
        for one in value if several else [value]:
            check_option(name, key, one, known[key])
        vision_width *= len(value) if several else 1
    if name == "qformer" and decoder and options.get("queries") == 0:
        raise ValueError("qformer needs one query or more beside a decoder; give queries=1 or more.")
    bridge = kind(decoder, vision_width, **{key: value for key, value in options.items() if key in own})
    for key in ("reads", "reads_cls"):
        if key in options:
            setattr(bridge, key, options[key])
    bridge.options = dict(options)
    return bridge


def refuse_unread_options(bridge: Bridge, given: dict, task: str) -> None:
    """A ValueError for an option of the command line that nobody reads beside the bridge's others.

    task: of the recipe that trains it. What a recipe, a published folder or a run sets is not asked.
    """
    kind, name = type(bridge), bridge.name
    chosen = {p.name: p.default for p in inspect.signature(kind).parameters.values()}
    chosen |= {**bridge.options, "reads": bridge.reads}
    chosen |= {"version": v for v, each in VERSIONS.get(name, {}).items() if each is kind}
    chosen["the loss"] = "its own" if task == name else "another recipe's"
    known, unread = {"version", "reads", "reads_cls", *arguments(kind)}, {}
    for option in sorted(given):
        where = unread_where(name, option, chosen) if option in known else {"version": chosen["version"]}
        if where is not None:
            reason = " and ".join(f"{key} is {str(value).lower()}" for key, value in where.items())
            unread.setdefault(f" where {reason}" if reason else "", []).append(option)
    for reason, options in unread.items():
        raise ValueError(f"{name} does not read {', '.join(options)}{reason}; leave "
                         f"{'it' if len(options) == 1 else 'them'} out.")
