"""formats/generation.py: what a published folder says about the writing of answers.

    read_ends            ids that end a text: honoured
    read_stop_strings    texts that end one: honoured
    left_out             what else would change an answer, in one sentence: it is not done

The file is generation_config.json; where there is none, an older config.json may say the same.
"""
from __future__ import annotations

import json
from pathlib import Path

from support.formats.files import read_json

# key → its values that change nothing in an answer that is greedy or searched for by --beams
DECODING = {
    **dict.fromkeys(("do_sample", "early_stopping"), (False,)),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty",
                     "length_penalty", "guidance_scale", "num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("top_k", "min_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha",
                     "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length",
                     "min_new_tokens"), (0,)),
    "max_length": (20,),                                # transformers' own, in every config.json of old
    **dict.fromkeys(("max_new_tokens", "max_time", "bad_words_ids", "force_words_ids", "constraints",
                     "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
                     "forced_eos_token_id", "forced_decoder_ids", "sequence_bias", "dola_layers",
                     "exponential_decay_length_penalty", "watermarking_config"), ()),
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def generation_config(folder: Path) -> tuple[Path, dict]:
    """The file that speaks of generation, and its content."""
    files = [file for name in ("generation_config.json", "config.json") if (file := folder / name).exists()]
    return (files[0], read_json(files[0])) if files else (folder / "generation_config.json", {})


def read_ends(folder: Path) -> frozenset[int]:
    """The eos ids of generation_config.json and config.json: each has one, a list, or none."""
    ends = set()
    for file in (folder / "generation_config.json", folder / "config.json"):
        content = read_json(file) if file.exists() else {}
        text = content.get("text_config")
        for part in (content, text if isinstance(text, dict) else {}):
            ids = part.get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            ends |= {i for i in ids if i is not None and i >= 0}        # early LLaMA files write −1 for none
    return frozenset(ends)


def read_stop_strings(folder: Path) -> tuple[str, ...]:
    texts = generation_config(folder)[1].get("stop_strings") or ()
    return tuple(text for text in ([texts] if isinstance(texts, str) else texts) if text)


def left_out(folder: Path) -> str:
    """A sentence that names what the folder asks for beyond this; "" where that is nothing."""
    file, content = generation_config(folder)
    asked = {key: content[key] for key, neutral in DECODING.items()
             if content.get(key) not in (None, [], {}, *neutral)}
    if not asked.get("do_sample"):                      # without it transformers does not read them
        asked = {key: value for key, value in asked.items() if key not in SAMPLING}
    if not asked:
        return ""
    words = ", ".join(key if value is True else f"{key} {json.dumps(value):.40}"
                      for key, value in asked.items())
    return (f"{file}: asks for {words}; this is left out, an answer is the likeliest text, at most "
            "--max-new-tokens long.")
