"""support/formats: what others specified: weights, tokenizers, processors, data sets, benchmarks."""
from support.formats.llama import load_decoder
from support.formats.pictures import load_processor, read_image
from support.formats.tokenizer_files import load_tokenizer
from support.formats.vision import load_clip, load_vit
from support.formats.vlm import load_bridge, load_vlm, save_vlm

__all__ = ["load_bridge", "load_clip", "load_decoder", "load_processor", "load_tokenizer", "load_vit",
           "load_vlm", "read_image", "save_vlm"]
