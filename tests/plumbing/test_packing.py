"""Documents and the room for them."""
from types import SimpleNamespace

import pytest

import data
from model import IMAGE
from support.formats.files import UserError
from support.plumbing.packing import pack_documents, positions, require_room
from support.worlds.text import shapes_tokenizer


def document(words: int) -> data.Document:
    """A picture and so many tokens, each of them learned."""
    return data.Document(shapes_tokenizer()).image().ids([5] * words, learn=True)


def test_a_document_beyond_what_the_decoder_was_trained_on_is_said_and_names_the_flag(capsys):
    size = positions(document(20), 9)
    require_room([document(20)], 100, 9, "coco:x", context=size)
    assert capsys.readouterr().err == ""
    require_room([document(3), document(20)], 100, 9, "coco:x", context=size - 1)
    said = capsys.readouterr().err
    assert f"takes {size} positions" in said and f"--longest {size - 1}" in said
    with pytest.raises(UserError, match="nothing is left"):
        require_room([document(20)], 5, 9, "coco:x", context=100)


def test_the_longest_documents_take_the_first_row_with_room():
    fake = [SimpleNamespace(tokens=tokens) for tokens in ([IMAGE], [1] * 6, [IMAGE, 1], [1] * 4, [1])]
    assert [positions(d, 3) for d in fake] == [3, 6, 4, 4, 1]
    assert pack_documents(fake, 10, 3) == [[1, 2], [3, 0, 4]]
