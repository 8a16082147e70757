"""Sources with mutated bytes are read or rejected with a message, without side effects."""

from __future__ import annotations

import io
import random
import zipfile

import pytest
import torch
from helpers.megatron_layout import write_megatron
from helpers.tiny_folders import LLAMA, make_folder

from megatrain.conversion.detect_format import Hints, open_source
from megatrain.conversion.sources import check_coverage, read_row_blocks
from megatrain.errors import UserError
from megatrain.models.config import read_config
from megatrain.models.counts import parameter_shapes

SMALL = {
    **LLAMA,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 12,
}
CASES = 60


@pytest.fixture(scope="module")
def root_folder(tmp_path_factory):
    """A tiny model in each format."""
    root = tmp_path_factory.mktemp("fuzzed")
    model = make_folder(root / "hf", SMALL)
    write_megatron(root / "megatron", model, tensor=2)
    for name, tensor in model.state_dict().items():
        place = root / "universal" / "zero" / name
        place.mkdir(parents=True)
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            torch.save({"param": tensor.clone()}, place / f"{state}.pt")
        torch.save(torch.tensor(3.0), place / "step.pt")
    return root


def read_through(folder, config):
    """Reads every tensor as a conversion does."""
    source = open_source(folder, Hints(config=str(config)))
    architecture = read_config(source.config)
    expected = parameter_shapes(architecture)
    source.bind(architecture, expected)
    check_coverage(source, architecture, expected)
    for name in expected:
        assert sum(len(block) for block in read_row_blocks(source, name)) == expected[name][0]
    if hasattr(source, "moments"):
        source.moments()


def mutated(content, chance):
    """Flips, clears, truncates, moves or doubles bytes."""
    content = bytearray(content)
    kind = chance.choice(["flip", "flip", "many", "clear", "cut", "move", "double"])
    at = chance.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "many":
        for _ in range(20):
            content[chance.randrange(len(content))] = chance.randrange(256)
    elif kind == "clear":
        content[at : at + 16] = bytes(16)
    elif kind == "cut":
        del content[at:]
    elif kind == "move":
        other = chance.randrange(len(content))
        content[at : at + 8], content[other : other + 8] = (
            content[other : other + 8],
            content[at : at + 8],
        )
    else:
        content[at:at] = content[at : at + 32]
    return bytes(content)


def mutate_pickle(content, chance):
    """Mutates the description of the tensors inside a valid archive."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as before,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as after,
    ):
        for entry in before.infolist():
            held = before.read(entry)
            after.writestr(
                entry.filename,
                mutated(held, chance) if entry.filename.endswith("data.pkl") else held,
            )
    return packed.getvalue()


@pytest.mark.parametrize("kind", ["megatron", "universal"])
@pytest.mark.parametrize("how", [mutated, mutate_pickle], ids=["file", "pickle"])
def test_mutated_files_are_read_or_rejected(kind, how, root_folder):
    files = sorted(
        (root_folder / kind).rglob("model_optim_rng.pt" if kind == "megatron" else "*.pt")
    )
    everything = {path: path.read_bytes() for path in root_folder.rglob("*") if path.is_file()}
    refusals = []
    for number in range(CASES):
        chance = random.Random(f"{kind} {how.__name__} {number}")
        path = chance.choice(files)
        whole = everything[path]
        path.write_bytes(how(whole, chance))
        try:
            read_through(root_folder / kind, root_folder / "hf")
        except UserError as error:
            refusals.append(str(error))
        except Exception as error:
            raise AssertionError(f"case {number} of {path.name}: {type(error).__name__}") from error
        finally:
            path.write_bytes(whole)
    assert {
        path: path.read_bytes() for path in root_folder.rglob("*") if path.is_file()
    } == everything
    assert 0 < len(refusals) < CASES, "some mutations are of what is not read"
    assert [words for words in refusals if not 20 < len(words) < 600 or "\n" in words] == []


def test_intact_files_are_read(root_folder):
    for kind in ("megatron", "universal", "hf"):
        if kind == "hf":
            open_source(root_folder / kind, Hints())
        else:
            read_through(root_folder / kind, root_folder / "hf")
