"""The identity of a prompt: everything that the model reads, and nothing else."""

from __future__ import annotations

import hashlib
import subprocess
import sys

from selfeval.prompt import Image, Prompt


def test_an_image_is_compared_by_its_content() -> None:
    assert Image(b"one") == Image(bytes(bytearray(b"one")))
    assert len({Image(b"one"), Image(b"one"), Image(b"two")}) == 2
    assert Image(b"one").sha256 == hashlib.sha256(b"one").hexdigest()
    assert "one" not in repr(Image(b"one"))  # a message that shows a prompt must not show megabytes


def test_a_prompt_is_compared_by_its_ids_and_its_images() -> None:
    plain, one, other = Prompt((5, 9)), Prompt((5, 9), (Image(b"one"),)), Prompt((5, 9), (Image(b"two"),))
    assert Prompt((5, 9)) == plain
    assert len({plain, one, other, Prompt((5, 9), (Image(b"one"),))}) == 3
    assert Prompt((5, 9), (Image(b"one"), Image(b"two"))) != Prompt((5, 9), (Image(b"two"), Image(b"one")))


def test_appending_tokens_keeps_the_images() -> None:
    prompt = Prompt((5, 9), (Image(b"one"),))
    assert prompt.followed_by([2, 3]) == Prompt((5, 9, 2, 3), (Image(b"one"),))


def test_prompts_import_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import selfeval.prompt, sys; assert 'torch' not in sys.modules"], check=True)
