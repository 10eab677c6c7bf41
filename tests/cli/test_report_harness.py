"""Reports on what lm-evaluation-harness logs, by having it log something."""

import json
import math
import warnings
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("lm_eval")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import lm_eval
import torch
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from levelhead.cli import main

QUESTIONS = 24
TASKS = {
    "sums": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "spoken": """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 2, until: [x]}
metric_list: [{metric: exact_match}]
""",
    "likely": """
output_type: loglikelihood
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> dict[str, Path]:
    """A log for every task, by a tiny model that reads characters."""
    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {"question": f"{i} + 2 =", "choices": [str(i + 2), str(i), "x"], "answer": i % 3}
        for i in range(QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
            f'test_split: test\ndoc_to_text: "{{{{question}}}}"\n{text}'
        )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the harness and of what it imports
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        tracker = EvaluationTracker(output_path=str(folder / "out"))
        found = lm_eval.simple_evaluate(
            _model(),
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            evaluation_tracker=tracker,
            log_samples=True,
            bootstrap_iters=0,
        )
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for name in samples:
            tracker.save_results_samples(task_name=name, samples=samples[name])
    return {name: next((folder / "out").glob(f"*/samples_{name}_*.jsonl")) for name in TASKS}


def _model() -> HFLM:
    characters = ["<unk>", "<eos>", *"0123456789 +=x"]
    tokens = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return HFLM(pretrained=LlamaForCausalLM(config), tokenizer=tokenizer, device="cpu")


def test_confidence_is_the_softmax_over_the_choices(logs, capsys):
    assert main(["report", "--json", str(logs["sums"])]) == 0
    results = json.loads(capsys.readouterr().out)
    samples = [json.loads(line) for line in logs["sums"].read_text().splitlines()]
    confidence = []
    for sample in samples:
        likelihoods = [float(value) for value, _ in sample["filtered_resps"]]
        weights = [math.exp(value) for value in likelihoods]
        confidence.append(max(weights) / sum(weights))
    metrics = results["scores"]["confidence"]["overall"]["metrics"]
    assert results["answers"] == QUESTIONS
    assert metrics["mean_confidence"]["estimate"] == pytest.approx(sum(confidence) / QUESTIONS)
    accuracy = sum(sample["acc"] for sample in samples) / QUESTIONS
    assert metrics["accuracy"]["estimate"] == pytest.approx(accuracy)
    assert any("softmax over the log-likelihoods" in note for note in results["notes"])
    assert results["constants"]["task"] == "sums"
    assert results["constants"]["model"] == logs["sums"].parent.name


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("spoken", "line 1: generated text (output_type generate_until)"),
        ("likely", "line 1: one likelihood (output_type loglikelihood)"),
        ("rolling", "line 1: a likelihood of the whole text (output_type loglikelihood_rolling)"),
    ],
)
def test_other_outputs_are_refused_with_the_reason(task, reason, logs, capsys):
    assert main(["report", "--json", str(logs[task])]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "multiple_choice" in error


def test_a_log_cut_short_is_refused_by_line(logs, tmp_path, capsys):
    path = tmp_path / logs["sums"].name
    path.write_bytes(logs["sums"].read_bytes()[:-100])
    assert main(["report", "--json", str(path)]) == 2
    assert f"line {QUESTIONS}: not JSON" in capsys.readouterr().err


def test_two_tasks_of_one_model_are_rows(logs, tmp_path, capsys):
    """Copied under another task's name, as a second log of the same folder."""
    second = tmp_path / logs["sums"].parent.name
    second.mkdir()
    for name in ("sums", "differences"):
        (second / logs["sums"].name.replace("sums", name)).write_bytes(logs["sums"].read_bytes())
    assert main(["report", "--json", "--by", "task", *map(str, sorted(second.iterdir()))]) == 0
    results = json.loads(capsys.readouterr().out)
    rows = results["scores"]["confidence"]["groups"]
    assert [row["name"] for row in rows] == ["differences", "sums"]
    assert results["comparison"]["how"].startswith("Paired")
    differences = [m["difference"]["estimate"] for m in results["comparison"]["metrics"].values()]
    assert differences == [0] * len(differences)
