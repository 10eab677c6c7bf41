"""A trainer of TRL that makes a loss of its own refuses a patched model; the docs say which do."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from tests.integrations.test_trainer import CHECKPOINTING
from tests.integrations.tiny_models import tiny

from levelhead.integrations import patch_model
from levelhead.integrations.trl import patch_trainer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from tests.integrations.test_trl import dataset, new_trainer, tokenizer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "integrations.md"

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # TRL's own, of what is experimental
    pytest.mark.usefixtures("_experimental"),
]


@pytest.fixture
def _experimental(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def _small():
    return tiny(dtype=torch.float32)


def _length(completions, **_):
    return [float(len(completion)) for completion in completions]


PROMPT = {"prompt": "w1 w2"}
PREFERENCE = PROMPT | {"chosen": " w3 w4", "rejected": " w5"}
TURNS = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
# By name: where it is in TRL, a row of its data, its own arguments of the config and of the trainer.
BUILT = {
    "DPO": ("trl", PREFERENCE, {}, {"ref_model": _small}),
    "KTO": ("trl", PROMPT | {"completion": " w3", "label": True}, {}, {"ref_model": _small}),
    "GRPO": (
        "trl",
        PROMPT,
        {"num_generations": 2, "max_completion_length": 4},
        {"reward_funcs": lambda: _length},
    ),
    "GKD": (
        "trl.experimental.gkd",
        {"messages": TURNS},
        {"max_length": 16, "lmbda": 0.0},
        {"teacher_model": _small},
    ),
}
STEPPED = {
    "CPO": ("trl.experimental.cpo", PREFERENCE, {"max_length": 16}, {}),
    "ORPO": ("trl.experimental.orpo", PREFERENCE, {"max_length": 16}, {}),
    "TPO": ("trl.experimental.tpo", PREFERENCE | {"reference": " w6"}, {}, {}),
    "OnlineDPO": (
        "trl.experimental.online_dpo",
        PROMPT,
        {"max_new_tokens": 4, "max_length": 16},
        {"reward_funcs": lambda: _length},
    ),
    "Distillation": ("trl", PROMPT, {"max_completion_length": 4}, {"teacher_model": _small}),
}


def _trainer(name, model, folder):
    module, row, of_config, of_trainer = (BUILT | STEPPED)[name]
    module = importlib.import_module(module)
    arguments = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        CHECKPOINTING: False,
    }
    return getattr(module, f"{name}Trainer")(
        model=model,
        args=getattr(module, f"{name}Config")(**arguments | of_config),
        train_dataset=datasets.Dataset.from_list([row] * 4),
        processing_class=tokenizer(),
        **{argument: make() for argument, make in of_trainer.items()},
    )


def _refusal(name):
    return rf"cannot train with {name}Trainer of TRL, whose loss is not .* Use unpatch_model first"


@pytest.mark.parametrize("name", BUILT)
def test_some_refuse_it_when_they_are_built(name, tmp_path):
    with pytest.raises(RuntimeError, match=_refusal(name)):
        _trainer(name, patch_model(_small()), tmp_path)


@pytest.mark.parametrize("name", STEPPED)
def test_others_refuse_it_in_their_first_step(name, tmp_path):
    model = patch_model(_small())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=_refusal(name)):
        _trainer(name, model, tmp_path).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_that_was_built_before_the_patch_refuses_it_too(tmp_path):
    trainer = _trainer("ORPO", _small(), tmp_path)
    patch_model(trainer.model)
    with pytest.raises(RuntimeError, match=_refusal("ORPO")):
        trainer.train()


@pytest.mark.parametrize("name", ["DPO", "GKD"])
def test_patch_trainer_takes_an_sft_trainer_only(name, tmp_path):
    got = rf"needs a trl.SFTTrainer, got {name}Trainer; .*patch_model"
    with pytest.raises(TypeError, match=got):
        patch_trainer(_trainer(name, _small(), tmp_path))


def test_a_fused_head_that_no_trainer_adds_is_refused():
    with pytest.raises(RuntimeError, match="cannot train with add_fused_lm_head of TRL"):
        add_fused_lm_head(patch_model(_small()))


def test_a_subclass_of_a_users_is_what_it_adds_to(tmp_path, monkeypatch):
    class Mine(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl, "SFTTrainer", Mine)
    trainer = new_trainer(patch_model(_small()), tmp_path, data=dataset(), max_steps=1)
    assert type(trainer) is Mine
    assert patch_trainer(trainer) is trainer
    trainer.train()


def test_the_docs_know_every_trainer_of_trl():
    modules = ["trl.trainer", "trl.experimental"]
    packages = [importlib.import_module(module) for module in modules]
    found = set()
    for package in packages:
        for entry in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if entry.name.endswith("_trainer"):
                source = Path(importlib.util.find_spec(entry.name).origin).read_text()
                found |= set(re.findall(r"^class ([A-Z]\w*)Trainer\(", source, re.MULTILINE))
    section = DOCS.read_text().split("## Which trainers of TRL")[1].split("\n## ")[0]
    named = set(re.findall(r"\b\w+\b", section))
    assert found >= {"SFT", *BUILT, *STEPPED}
    assert found <= named
