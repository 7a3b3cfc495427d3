"""A module of compile_elbo works in any training loop."""

import contextlib
import copy

import pytest
import torch

from pyro_ext.infer import ImportanceWeightedELBO
from tests.infer.svi.own_loops import (
    PAIRS,
    Decoder,
    Encoder,
    Loop,
    assert_same,
    compiled,
    decode,
    problem,
)
from tests.infer.svi.programs import Problem, images

pytestmark = pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")


def accumulate(loop):
    for _ in range(8):
        loop.optimizer.zero_grad()
        for rows in loop.x.split(5):
            loss = loop.module(rows)
            loop.losses.append(loss.item())
            (loss / 2).backward()
        loop.optimizer.step()


def accumulate_in_place(loop):
    for _ in range(8):
        loop.optimizer.zero_grad(set_to_none=False)
        for _ in range(3):
            loop.module(loop.x).backward()
        loop.optimizer.step()


def clip(loop):
    for _ in range(8):
        loop.optimizer.zero_grad()
        loop.module(loop.x).backward()
        loop.losses.append(torch.nn.utils.clip_grad_norm_(loop.params, 0.1).item())
        torch.nn.utils.clip_grad_value_(loop.params, 0.01)
        loop.optimizer.step()


def scale(loop):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for _ in range(8):
        loop.optimizer.zero_grad()
        scaler.scale(loop.module(loop.x)).backward()
        scaler.unscale_(loop.optimizer)
        torch.nn.utils.clip_grad_norm_(loop.params, 1.0)
        scaler.step(loop.optimizer)
        scaler.update()


def several_optimizers(loop):
    halves = loop.params[::2], loop.params[1::2]
    optimizers = torch.optim.SGD(halves[0], lr=1e-3), torch.optim.Adam(halves[1], lr=0.01)
    for step in range(12):
        loss = loop.module(loop.x)
        loop.module.zero_grad()
        loss.backward()
        optimizers[step % 3 // 2].step()
        loop.losses.append(loss.item())


@contextlib.contextmanager
def frozen(params):
    for param in params:
        param.requires_grad_(False)
    yield
    for param in params:
        param.requires_grad_(True)


def freeze(loop):
    loop.take(3)
    with frozen(loop.params[::2]):
        loop.take(4)
        assert [p for p in loop.params[::2] if p.grad is not None] == []
    loop.take(3)
    with frozen(loop.params):
        assert not loop.module(loop.x).requires_grad


def further_terms(loop):
    for step in range(8):
        loss = 0.1 * step * loop.module(loop.x) + loop.module(loop.x[:4])
        loop.step(loss / 10 + sum(param.square().sum() for param in loop.params))


def change_loss_in_place(loop):
    for _ in range(4):
        loss = loop.module(loop.x)
        loss /= 7
        loss += 1
        loop.step(loss)


def keep_the_graph(loop):
    for _ in range(4):
        loss = loop.module(loop.x)
        loss.backward(retain_graph=True)
        loop.losses.append(loop.params[0].grad.norm().item())
        loss.backward(retain_graph=True)
        found = torch.autograd.grad(2 * loss, loop.params)
        loop.losses += [x.sum().item() for x in found]


def evaluate(loop):
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for _ in range(3):
            with mode():
                loss = loop.module(loop.x)
            assert loss.requires_grad == (mode is torch.enable_grad)
            loop.losses.append(loss.item())
        loop.take(2)


def load(loop):
    loop.take(3)
    state = copy.deepcopy(loop.module.state_dict())
    loop.take(3)
    loop.module.load_state_dict(state)
    loop.take(3)


def hooks(loop):
    handles = [loop.params[0].register_hook(lambda gradient: 3 * gradient)]
    loop.take(4)
    handles += [loop.params[1].register_hook(lambda gradient: gradient.clamp(max=0))]
    seen = []
    handles += [loop.params[1].register_post_accumulate_grad_hook(seen.append)]
    loop.take(4)
    assert len(seen) == 4
    for handle in handles:
        handle.remove()
    loop.take(4)


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:.* was not registered in the param store:UserWarning")
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "run",
    [
        accumulate,
        accumulate_in_place,
        clip,
        scale,
        several_optimizers,
        freeze,
        further_terms,
        change_loss_in_place,
        keep_the_graph,
        evaluate,
        load,
        hooks,
    ],
    ids=lambda run: run.__name__,
)
def test_any_loop_gives_the_numbers_of_eager_steps(run, pair):
    assert_same(run, problem(pair))


def autocast(loop):
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loop.module(loop.x)
        loop.step(loss)


class PreciseDecoder(Decoder):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            decode(lambda z: self.net(z.float()), x)


def test_autocast_covers_the_loss_and_not_its_gradients():
    elbo = ImportanceWeightedELBO(3)
    assert_same(autocast, lambda: Problem(PreciseDecoder(), Encoder(), elbo, (images(),)))


def test_autocast_to_float16_takes_eager_steps():
    # Small gradients in float16 need the factor of a GradScaler before they vanish.
    loop = Loop(lambda elbo: compiled(elbo, fallback=True), problem("PyroModule"))
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.warns(UserWarning, match="under autocast to float16, the loss must be scaled"),
    ):
        loop.module(loop.x)
