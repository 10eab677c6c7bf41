"""TRL's SFTTrainer takes with a patched model the steps, and logs the metrics, of its own label smoothing."""

import warnings

import pytest
import torch
from tests.integrations.test_trainer import CHECKPOINTING, assert_same_parameters
from tests.integrations.tiny_models import VOCAB_SIZE, tiny, transformers

from levelhead.integrations import patch_model, unpatch_model
from levelhead.integrations.trl import patch_trainer
from levelhead.measure.gate import error_budget

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

SLOW = pytest.mark.slow
WORDS = VOCAB_SIZE - 2  # and a padding and an end token


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(WORDS)} | {"<pad>": WORDS, "<eos>": WORDS + 1}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content }} {% endgeneration %}{% else %}{{ message.content }} {% endif %}"
        "{% endfor %}"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", chat_template=template
    )


def texts(count=16):
    """Texts of different lengths, so that micro-batches weigh differently."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        words = torch.randint(WORDS, (4 + i % 9,), generator=generator).tolist()
        yield " ".join(f"w{word}" for word in words)


def dataset(completions=False):
    if not completions:
        return datasets.Dataset.from_list([{"text": text} for text in texts()])
    halves = [text.split(" ") for text in texts()]
    return datasets.Dataset.from_list(
        [{"prompt": " ".join(x[:3]) + " ", "completion": " ".join(x[3:])} for x in halves]
    )


def new_trainer(model, folder, *, data=None, trainer=None, **own):
    """An SFTTrainer of three steps of plain SGD on the CPU, `own` among its arguments."""
    arguments = {
        "output_dir": str(folder),
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        CHECKPOINTING: False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": 32,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated", FutureWarning)
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**arguments | own),
            train_dataset=dataset() if data is None else data,
            processing_class=tokenizer(),
            **trainer or {},
        )


def train(model, folder, **options):
    """`model` after the steps of `new_trainer`, and what was logged at each."""
    trainer = new_trainer(model, folder, **options)
    trainer.train()
    return model, logs(trainer)


def logs(trainer):
    times = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not any(t in name for t in times)}
        for entry in trainer.state.log_history
        if "train_loss" not in entry
    ]


def assert_same_logs(got, want):
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        # float32 rounding of losses and gradient norms of order 4
        assert one == pytest.approx(other, abs=2e-5)
        assert {"entropy", "mean_token_accuracy", "num_tokens"} <= {
            name.removeprefix("eval_") for name in one
        }


@pytest.mark.parametrize("completions", [False, True], ids=["text", "completions"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"completion_only_loss": False},
        {CHECKPOINTING: True},
        {"average_tokens_across_devices": False},
        {"padding_free": True, "max_length": None},
        {"packing": True},
        {"packing": True, "packing_strategy": "wrapped"},
        # Inductor takes minutes; the slow test of test_trainer.py has it.
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=SLOW),
    ],
    ids=lambda options: "-".join(options) or "accumulation",
)
def test_parameters_and_logs_equal_label_smoothing_factor(completions, options, tmp_path):
    data = dataset(completions)
    # TRL's own head does not compile with warnings as errors.
    eager = {name: value for name, value in options.items() if "compile" not in name}
    want, want_logs = train(
        tiny(dtype=torch.float32), tmp_path, data=data, label_smoothing_factor=0.1, **eager
    )
    patched = patch_model(tiny(dtype=torch.float32), smoothing=0.1)
    got, got_logs = train(patched, tmp_path, data=data, **options)
    assert_same_parameters(got, want)
    assert_same_logs(got_logs, want_logs)
    moved = (got.lm_head.weight - tiny(dtype=torch.float32).lm_head.weight).abs().max()
    assert moved > 1e-2  # there was something to get wrong


def test_bf16_autocast_is_as_close_to_float32_as_label_smoothing_factor(tmp_path):
    def error(model):
        return max(
            (model.get_parameter(name) - parameter).abs().max()
            for name, parameter in exact.named_parameters()
        )

    exact, _ = train(tiny(dtype=torch.float32), tmp_path, label_smoothing_factor=0.1)
    plain, _ = train(tiny(dtype=torch.float32), tmp_path, bf16=True, label_smoothing_factor=0.1)
    patched, _ = train(patch_model(tiny(dtype=torch.float32)), tmp_path, bf16=True)
    # The project's error budget: twice the dense path's; it is far above float32 rounding.
    assert 1e-6 < error(patched) <= error_budget(error(plain), 0, 0)  # without a rounding


@pytest.mark.parametrize("family", ["gemma2", "granite", "gpt2"])
def test_caps_and_scales_stay_the_models_own(family, tmp_path):
    # TRL's own label smoothing takes the logits from the model, and so what is done to them.
    model = tiny(family, dtype=torch.float32)
    small = {"learning_rate": 0.1}  # Granite's scale makes its gradients three times as large
    want, want_logs = train(model, tmp_path, label_smoothing_factor=0.1, **small)
    got, got_logs = train(patch_model(tiny(family, dtype=torch.float32)), tmp_path, **small)
    assert_same_parameters(got, want)
    assert_same_logs(got_logs, want_logs)


def test_the_router_loss_stays_in_the_loss(tmp_path):
    # Where TRL smooths by itself, it leaves the router loss out. That loss adds its gradient to any
    # other, so after one step of SGD what it changed is the same with smoothing and without.
    def after_one_step(patch=False, **options):
        model = tiny("mixtral", dtype=torch.float32, router_aux_loss_coef=0.5)
        if patch:
            patch_model(model)
        model, entries = train(model, tmp_path, max_steps=1, **options)
        return dict(model.named_parameters()), entries[0]

    hard, _ = after_one_step(router_aux_loss_coef=0.0)
    hard_and_router, want = after_one_step()
    smooth, _ = after_one_step(label_smoothing_factor=0.1, router_aux_loss_coef=0.0)
    smooth_and_router, got = after_one_step(patch=True)
    for name, parameter in smooth_and_router.items():
        routed = hard_and_router[name] - hard[name]
        # float32: differences of parameters of order one, each rounded by 6e-8
        torch.testing.assert_close(parameter - smooth[name], routed, rtol=0, atol=1e-6)
    gates = [name for name in hard if "gate.weight" in name]
    assert min((hard_and_router[name] - hard[name]).abs().max() for name in gates) > 1e-4
    assert got["aux_loss"] == pytest.approx(want["aux_loss"], abs=1e-6)


def test_assistant_masks(tmp_path):
    def message(role, words):
        return {"role": role, "content": " ".join(words)}

    words = [text.split(" ") for text in texts()]
    rows = [{"messages": [message("user", x[:2]), message("assistant", x[2:])]} for x in words]
    options = {"data": datasets.Dataset.from_list(rows), "assistant_only_loss": True}
    options["max_steps"] = 1
    want, want_logs = train(
        tiny(dtype=torch.float32), tmp_path, label_smoothing_factor=0.1, **options
    )
    got, got_logs = train(patch_model(tiny(dtype=torch.float32)), tmp_path, **options)
    assert_same_parameters(got, want)
    assert_same_logs(got_logs, want_logs)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.parametrize("patched_by", [patch_model, patch_trainer])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_lora(patched_by, options, tmp_path):
    peft = pytest.importorskip("peft")
    names = {"target_modules": ["o_proj", "down_proj"], "task_type": "CAUSAL_LM"}

    def trainer(patch, **own):
        torch.manual_seed(1)
        model = tiny(dtype=torch.float32)
        if patch is patch_model:
            patch_model(model)
        lora = {"peft_config": peft.LoraConfig(**names | options)}
        found = new_trainer(model, tmp_path, trainer=lora, **own)
        if patch is patch_trainer:
            assert patch_trainer(found) is found
        found.train()
        return found

    want, got = trainer(None, label_smoothing_factor=0.1), trainer(patched_by)
    assert_same_parameters(got.model, want.model)
    assert_same_logs(logs(got), logs(want))
    adapters = [p for name, p in got.model.named_parameters() if "lora_B" in name]
    assert min(adapter.abs().max() for adapter in adapters) > 1e-4  # they begin at zero


def test_a_step_runs_the_model_once_and_its_head_gives_no_logits(tmp_path):
    def calls(model, **options):
        trainer = new_trainer(model, tmp_path, **options)
        seen = []
        hooks = [
            model.model.register_forward_hook(lambda *_: seen.append("backbone")),
            model.lm_head.register_forward_hook(
                lambda _m, _i, out: seen.append(out.shape[:-1].numel() > 1)
            ),
        ]
        trainer.train()
        for hook in hooks:
            hook.remove()
        return seen

    micro_batches = 3 * 2
    by_trl = calls(tiny(dtype=torch.float32), label_smoothing_factor=0.1)
    assert by_trl == ["backbone", True, "backbone"] * micro_batches
    assert calls(patch_model(tiny(dtype=torch.float32))) == ["backbone", False] * micro_batches


@pytest.mark.parametrize("eval_smoothing", [0.0, 0.1])
def test_the_loss_of_an_evaluation_is_smoothed_if_asked_for(eval_smoothing, tmp_path):
    def evaluate(model, **options):
        data = dataset(completions=True)
        trainer = new_trainer(model, tmp_path, trainer={"eval_dataset": data}, **options)
        found = trainer.evaluate()
        return {name: value for name, value in found.items() if "time" not in name}

    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 20  # or smoothing would change the loss of a new model by nothing
    want = evaluate(model, label_smoothing_factor=eval_smoothing)
    del model.forward  # TRL's
    got = evaluate(patch_model(model, smoothing=0.3, eval_smoothing=eval_smoothing))
    assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= want.keys()
    for name in want.keys() & {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"}:
        assert got[name] == pytest.approx(want[name], abs=5e-6)  # float32 rounding, order 5


def test_compute_metrics_sees_the_logits(tmp_path):
    shapes = []
    hooks = {
        "eval_dataset": dataset(),
        "compute_metrics": lambda prediction: shapes.append(prediction.predictions.shape) or {},
    }
    trainer = new_trainer(patch_model(tiny(dtype=torch.float32)), tmp_path, trainer=hooks)
    with pytest.warns(FutureWarning, match="return_outputs"):
        trainer.evaluate()
    assert shapes[0][0::2] == (16, VOCAB_SIZE)


def test_a_schedule_of_the_smoothing(tmp_path):
    from levelhead.integrations.transformers import SmoothingSchedule

    constant, _ = train(patch_model(tiny(dtype=torch.float32), smoothing=0.3), tmp_path)
    options = {"trainer": {"callbacks": [SmoothingSchedule(lambda _progress: 0.3)]}}
    got, got_logs = train(patch_model(tiny(dtype=torch.float32)), tmp_path, **options)
    assert_same_parameters(got, constant)
    assert [entry["smoothing"] for entry in got_logs] == [0.3] * 3


def test_label_smoothing_factor_beside_the_patch_is_warned_of_and_takes_effect(tmp_path):
    want, want_logs = train(tiny(dtype=torch.float32), tmp_path, label_smoothing_factor=0.1)
    model = patch_model(tiny(dtype=torch.float32), smoothing=0.3)
    with pytest.warns(UserWarning, match="label_smoothing_factor or compute_loss_func") as warned:
        got, got_logs = train(model, tmp_path, label_smoothing_factor=0.1)
    assert len(warned) == 1
    assert_same_parameters(got, want)
    assert_same_logs(got_logs, want_logs)


def test_a_model_unpatched_in_the_trainer_takes_the_steps_of_trl(tmp_path):
    want, want_logs = train(tiny(dtype=torch.float32), tmp_path)
    trainer = new_trainer(patch_model(tiny(dtype=torch.float32)), tmp_path)
    unpatch_model(trainer.model)
    trainer.train()
    assert_same_parameters(trainer.model, want, atol=0.0)
    assert logs(trainer) == want_logs
