"""A module of compile_elbo trains in Lightning's Trainer as Pyro's module does in a plain loop."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.infer.svi.own_loops import Loop, compiled, eager, problem
from tests.infer.svi.programs import images

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data"),
    pytest.mark.filterwarnings("ignore:.* was not registered in the param store:UserWarning"),
    # Advice of Lightning, and a name of torch that it uses.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

NUM_STEPS, NUM_TEST, MAX_NORM = 200, 20, 20.0


class Training(lightning.LightningModule):
    def __init__(self, loop):
        super().__init__()
        self.loss = loop.module
        self.loop = loop
        self.held_out = []

    def configure_optimizers(self):
        return self.loop.optimizer

    def training_step(self, x, batch_idx):
        loss = self.loss(x)
        self.loop.losses.append(loss.item())
        return loss

    def validation_step(self, x, batch_idx):
        self.held_out.append(self.loss(x).item())

    def on_train_end(self):
        self.loss.audit()


def loaders():
    return DataLoader(images(10 * NUM_STEPS), batch_size=10), DataLoader(images(NUM_TEST), NUM_TEST)


def train_plainly(loop):
    train, test = loaders()
    norms = []
    for x in train:
        loss = loop.module(x)
        loop.optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(loop.params, MAX_NORM).item())
        loop.optimizer.step()
        loop.losses.append(loss.item())
    assert min(norms) < MAX_NORM < max(norms)
    loop.module.eval()
    with torch.no_grad():
        return [loop.module(x).item() for x in test]


def train_with_lightning(loop, folder):
    training = Training(loop)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=MAX_NORM,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(training, *loaders())
    return training.held_out


@pytest.mark.long
@pytest.mark.parametrize(
    ("pair", "backend"),
    [
        ("PyroModule", "eager"),
        pytest.param("nn.Module", "inductor", marks=pytest.mark.slow),
    ],
)
def test_lightning_gives_the_numbers_of_eager_steps(pair, backend, tmp_path):
    plain = Loop(eager, problem(pair))
    expected = train_plainly(plain)
    loop = Loop(lambda elbo: compiled(elbo, backend=backend), problem(pair))
    found = train_with_lightning(loop, tmp_path)
    assert len(loop.losses) == NUM_STEPS
    torch.testing.assert_close(loop.losses + found, plain.losses + expected, rtol=1e-5, atol=0.0)
    assert loop.module._graphs.count == 2  # with gradients, and without
