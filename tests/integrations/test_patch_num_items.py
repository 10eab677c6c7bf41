"""`num_items_in_batch` divides the sum of the losses, as under gradient accumulation."""

import pytest
import torch
from tests.integrations.tiny_models import assert_same_training, batch, dense_loss, tiny

from levelhead.integrations import patch_model


@pytest.mark.parametrize("num_items", [29, torch.tensor(29), torch.tensor([29])])
def test_num_items_in_batch_is_the_denominator(num_items):
    plain, patched = tiny(), patch_model(tiny())
    loss = patched(**batch(), num_items_in_batch=num_items).loss
    assert loss.shape == ()
    assert_same_training(patched, loss, plain, dense_loss(plain, **batch(), num_items=29))


def test_two_halves_with_the_count_of_the_whole_add_up_to_the_whole():
    model, inputs = patch_model(tiny()), batch()
    count = (inputs["labels"][:, 1:] != -100).sum()
    rows = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(2)]
    halves = sum(model(**row, num_items_in_batch=count).loss for row in rows)
    torch.testing.assert_close(halves, model(**inputs).loss, rtol=0, atol=1e-12)


def test_a_count_of_zero_gives_zero_and_not_nan():
    model, inputs = patch_model(tiny()), batch()
    labels = torch.full_like(inputs["labels"], -100)
    assert model(inputs["input_ids"], labels=labels, num_items_in_batch=0).loss.item() == 0
