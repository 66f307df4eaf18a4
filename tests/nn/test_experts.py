"""A mixture of experts of a feed-forward's own channels."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from ditq.nn import describe, rebuild
from ditq.nn.sliced import FeedForwardForm, hidden_of, linear_of, sliced
from ditq.nn.structural.experts import MixtureOfExperts, divided
from ditq.numerics.routing import route
from tests.families_small import FAMILIES, forward, small_graph, small_inputs

FORM = FeedForwardForm(("net.0.proj",), "net.2", 24)
ACTIVATIONS = ("gelu", "gelu-approximate", "geglu", "swiglu")


def dense_feed_forward(activation: str = "gelu") -> nn.Module:
    torch.manual_seed(3)
    made = FeedForward(8, inner_dim=24, activation_fn=activation).double().eval()
    return made.requires_grad_(False)


def mixture_of(
    activation: str = "gelu", top: int = 2, capacity: float = 4.0, choice: str = "token"
) -> MixtureOfExperts:
    """8 channels for all tokens, 4 experts of 4, with a router of random weights."""
    channels = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    mixture = divided(
        dense_feed_forward(activation),
        FORM,
        channels[:8],
        channels[8:].view(4, 4),
        top=top,
        capacity=capacity,
        choice=choice,
    )
    nn.init.normal_(mixture.router.weight)
    return mixture.double()


def tokens(samples: int = 3, count: int = 10) -> torch.Tensor:
    return torch.randn(samples, count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("choice", ["token", "expert"])
def test_with_all_experts_it_is_the_dense_feed_forward(activation, choice):
    x = tokens()
    expected = dense_feed_forward(activation)(x)
    assert torch.allclose(mixture_of(activation, top=4, capacity=1.0, choice=choice)(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_experts_a_model_is_as_before(family):
    from ditq.passes.feed_forwards import isolate

    graph = small_graph(family)
    model = graph.model.double()
    inputs = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in small_inputs(model).items()
    }
    expected = forward(model, inputs)
    for found in list(graph.feed_forwards.values()):
        place = isolate(graph, found)
        dense, hidden = model.get_submodule(place.module), place.form.hidden
        order = torch.randperm(hidden, generator=torch.Generator().manual_seed(0))
        parts = order[hidden // 4 :].view(12, -1)
        mixture = divided(dense, place.form, order[: hidden // 4], parts, top=12, capacity=1.0, choice="token")
        graph.replace(place.module, mixture)
    assert len(describe(model)["structural"]) >= len(graph.feed_forwards)
    assert torch.allclose(forward(model, inputs), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def by_hand(mixture: MixtureOfExperts, x: torch.Tensor, slots: int) -> torch.Tensor:
    """The definition, token by token."""
    y = mixture.shared(x)
    for sample in range(len(x)):
        scores = mixture.scores(x)[sample]
        for number, expert in enumerate(mixture.experts):
            if mixture.choice == "token":
                asking = [n for n in range(x.shape[1]) if number in scores[n].topk(mixture.top).indices]
            else:
                asking = list(range(x.shape[1]))
            asking.sort(key=lambda n: -float(scores[n, number]))
            for n in asking[:slots]:
                y[sample, n] += expert(x[sample, n])
    return y


@pytest.mark.parametrize("choice", ["token", "expert"])
@pytest.mark.parametrize(("capacity", "slots"), [(1.0, 5), (1.25, 7), (0.5, 3), (2.0, 10)])
def test_experts_answer_the_tokens_of_the_highest_scores(choice, capacity, slots):
    mixture, x = mixture_of(capacity=capacity, choice=choice), tokens()
    assert mixture.slots(10) == slots
    mixture.chosen = []
    assert torch.allclose(mixture(x), by_hand(mixture, x, slots), rtol=0, atol=1e-12)
    answered = mixture.chosen[0]  # [B, E, N]
    asked = (
        torch.zeros_like(answered).transpose(1, 2).scatter(2, mixture.scores(x).topk(2).indices, True).transpose(1, 2)
    )
    if choice == "token":
        assert not (answered & ~asked).any()
        assert torch.equal(answered.sum(dim=2), asked.sum(dim=2).clamp_max(slots))
    else:
        assert (answered.sum(dim=2) == slots).all()


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(choice):
    mixture, x = mixture_of(capacity=1.0, choice=choice), tokens()
    alone = torch.cat([mixture(sample[None]) for sample in x])
    assert torch.allclose(mixture(x), alone, rtol=0, atol=1e-12)


def test_training_gives_the_router_a_gradient_and_changes_no_value():
    mixture, x = mixture_of(capacity=1.0), tokens()
    expected = mixture(x)
    mixture.train().router.weight.requires_grad_()
    y = mixture(x)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(y.square().sum(), mixture.router.weight, retain_graph=True)
    assert float(gradient.abs().max()) > 0
    loss = mixture.auxiliary_loss()
    assert loss is not None and loss.requires_grad and float(loss.detach()) > -1


def test_equal_loads_cost_nothing():
    mixture = mixture_of()
    mixture.router.weight.zero_()
    mixture.balance.zero_()
    mixture.train()(tokens())
    loss = mixture.auxiliary_loss()
    assert loss is not None and abs(float(loss.detach())) < 1e-12  # all shares are equal, whoever is asked


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slices_make_the_chosen_channels(activation):
    dense, x, channels = dense_feed_forward(activation), tokens(), torch.tensor([3, 17, 20])
    part = sliced(dense, FORM, channels)
    assert torch.allclose(hidden_of(part, FORM, x), hidden_of(dense, FORM, x)[..., channels], rtol=0, atol=1e-12)
    assert linear_of(part, "net.2").bias is None


@pytest.mark.parametrize("representative", [False, True])
def test_an_engine_is_rebuilt_with_its_experts(representative):
    graph = small_graph("flux")
    fresh = copy.deepcopy(graph.model)
    from ditq.passes.feed_forwards import isolate

    for found in list(graph.feed_forwards.values())[-2:]:
        place = isolate(graph, found)
        order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
        parts = order[64:].view(12, 16)
        dense = graph.model.get_submodule(place.module)
        mixture = divided(
            dense,
            place.form,
            order[:64],
            parts,
            parts[:, 0] if representative else None,
            top=2,
            capacity=1.25,
            choice="token",
        )
        if not representative:
            nn.init.normal_(mixture.router.weight)
        graph.replace(place.module, mixture)
    rebuild(fresh, describe(graph.model), graph.model.state_dict())
    inputs = small_inputs(graph.model)
    assert torch.equal(forward(fresh, inputs), forward(graph.model, inputs))


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_of_equal_scores_the_first_count(choice):
    """As ONNX's TopK has it, so that an engine sends the tokens of a padded text where torch does."""
    scores = torch.zeros(2, 200, 4)
    scores[:, 5] = 1
    routes = route(scores, 2, 12, choice)
    assert routes.asked[0, 7].tolist() == [0, 1]
    answered = 2 if choice == "token" else 4  # of four experts all tokens ask the first two
    assert all(routes.token[0, expert].tolist() == [5, *range(5), *range(6, 12)] for expert in range(answered))
