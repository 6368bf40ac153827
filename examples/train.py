"""Trains a vision transformer on whatever it finds, from a laptop to a pod.

One device or many, one process or several: losses are the same. What is saved while it
trains is divided as the parameters are, and a run goes on from the last checkpoint in
its folder, also on another mesh, or in another number of processes.

    python -m examples.train run --steps 200
    python -m examples.train run --steps 400 --fsdp 2 --tensor 2  # on 4 devices or more

On a pod, run it on all hosts with --distributed. `docs/tpu.md` has the commands.
"""

import argparse
import math
import os
import sys
import traceback

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track
from sklearn.datasets import load_digits

from flax_mha import MultiheadAttention, sharding, training

RULES = (*sharding.RULES, ("mlp", "tensor"))
BATCH = P(("data", "fsdp"))
IMAGES = 1440  # of 1797, to train on


def dense(features, *axes, dtype):
    init = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), axes)
    return nn.Dense(features, dtype=dtype, kernel_init=init)


class Block(nn.Module):
    """Attention, then an MLP, each on a normed input and added to its input."""

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x, deterministic):  # (batch, patches, width)
        width, dtype = x.shape[-1], self.dtype
        attend = MultiheadAttention(
            width, self.heads, dropout=0.1, batch_first=True, dtype=dtype
        )
        y = nn.LayerNorm(dtype=dtype)(x)
        x = x + attend(y, y, y, need_weights=False, deterministic=deterministic)[0]
        y = nn.LayerNorm(dtype=dtype)(x)
        y = nn.gelu(dense(4 * width, "embed", "mlp", dtype=dtype)(y))
        x = x + dense(width, "mlp", "embed", dtype=dtype)(y)
        return nn.with_logical_constraint(x, ("batch", "length", None)), None


class VisionTransformer(nn.Module):
    """Classifies square images from patches of 2x2 pixels."""

    width: int
    heads: int
    layers: int
    dtype: str = "float32"  # of activations; parameters are float32

    @nn.compact
    def __call__(self, images, deterministic):  # (batch, size, size)
        side = images.shape[1] // 2
        x = images.reshape(-1, side, 2, side, 2).swapaxes(2, 3)
        x = x.reshape(-1, side * side, 4)
        init = nn.with_logical_partitioning(
            nn.initializers.normal(0.02), (None, "embed")
        )
        x = dense(self.width, None, "embed", dtype=self.dtype)(x)
        x = x + self.param("positions", init, x.shape[1:]).astype(self.dtype)
        blocks = nn.scan(  # of which one is compiled, however many they are
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(self.heads, self.dtype)(x, deterministic)
        x = nn.LayerNorm()(x).mean(axis=1)
        return dense(10, "embed", None, dtype=jnp.float32)(x)


def digits():
    """Returns images and labels to train on, and to test with."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    return (images[:IMAGES], labels[:IMAGES]), (images[IMAGES:], labels[IMAGES:])


def batch_of(step, images, labels, size, mesh):
    """Returns a step's batch, of which each process makes what its devices hold."""
    epoch, at = divmod(step, len(images) // size)
    order = np.random.default_rng(epoch).permutation(len(images))
    chosen = order[at * size :][:size]

    def divided(array):
        shape, where = (size, *array.shape[1:]), NamedSharding(mesh, BATCH)
        return jax.make_array_from_callback(
            shape, where, lambda at: array[chosen[at[0]]]
        )

    return divided(images), divided(labels)


def creator(model, mesh, size=8):
    """Returns a function that makes what is trained, divided over a mesh."""
    adamw = optax.adamw(1e-3, weight_decay=0.05, mask=training.decay_mask)

    def create():  # in Flax's boxes, which know the names of axes
        images = jnp.zeros((1, size, size))
        params = model.init(jax.random.key(0), images, True)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=adamw)

    shardings = sharding.param_shardings(jax.eval_shape(create), mesh, RULES)
    return jax.jit(create, out_shardings=shardings)


def train_step(state, images, labels):
    rng = jax.random.fold_in(jax.random.key(1), state.step)

    def loss(params):
        rngs = {"dropout": rng}
        logits = state.apply_fn({"params": params}, images, False, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), loss


def accuracy(state, images, labels):
    logits = state.apply_fn({"params": state.params}, images, True)
    return (logits.argmax(-1) == labels).mean()


def train(args, mesh):
    model = VisionTransformer(args.width, args.heads, args.layers, args.dtype)
    create = creator(model, mesh)
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=args.save_every,
        max_to_keep=2,
        cleanup_tmp_directories=True,  # of a run that was killed while it saved
    )
    folder = args.folder if "://" in args.folder else os.path.abspath(args.folder)
    manager = ocp.CheckpointManager(folder, options=options)
    start = manager.latest_step() or 0
    if start:
        wanted = ocp.args.StandardRestore(create.eval_shape())  # and where
        state = manager.restore(start, args=wanted)
    else:
        state = create()
    (images, labels), test = digits()
    batch = batch_of(start, images, labels, args.batch, mesh)
    step = jax.jit(train_step, donate_argnums=0)
    is_first = jax.process_index() == 0
    quiet = not (is_first and sys.stderr.isatty())
    for n in track(range(start, args.steps), disable=quiet):
        state, loss = step(state, *batch)
        batch = batch_of(n + 1, images, labels, args.batch, mesh)  # in the meantime
        loss = float(loss)  # waits: if another process is gone, this says so
        if is_first and (n + 1) % args.log_every == 0:
            print(f"step {n + 1}: loss {loss:.6f}", flush=True)
        last = n + 1 == args.steps
        manager.save(n + 1, args=ocp.args.StandardSave(state), force=last)
        if manager.reached_preemption(n + 1):  # SIGTERM in one process: saved by all
            break
    manager.close()  # when all is written
    size = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = batch_of(0, *test, len(test[0]) // size * size, mesh)
    right = jax.jit(accuracy)(state, *batch)
    if is_first:
        print(f"accuracy on digits it has not seen: {right:.1%}")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", help="of checkpoints, that all processes can write to; or gs://...")
    add("--steps", type=int, default=200, help="of all runs in this folder together")
    add("--batch", type=int, default=64, help="images in a step, of all devices")
    add("--width", type=int, default=64)
    add("--heads", type=int, default=4)
    add("--layers", type=int, default=3)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--fsdp", type=int, default=1, help="devices that divide the parameters")
    add("--context", type=int, default=1, help="devices that divide the length")
    add("--tensor", type=int, default=1, help="devices that divide heads and MLPs")
    add("--save-every", type=int, default=50, metavar="STEPS")
    add("--log-every", type=int, default=10, metavar="STEPS")
    said = "one of several processes; which, TPU pods and Slurm know by themselves"
    add("--distributed", nargs="*", metavar="ADDRESS COUNT INDEX", help=said)
    args = parser.parse_args(argv)
    if len(args.distributed or ()) not in (0, 3):
        parser.error("--distributed takes nothing, or ADDRESS COUNT INDEX")
    return args


def make_mesh(args):
    """Returns a mesh of all devices; those of no flag are for data."""
    flags = args.fsdp, args.context, args.tensor
    data, left = divmod(jax.device_count(), math.prod(flags))
    if left or args.batch % (data * args.fsdp) or args.batch > IMAGES:
        raise SystemExit(
            f"--fsdp times --context times --tensor must divide the "
            f"{jax.device_count()} devices, and those of data and --fsdp must divide "
            f"--batch, of {IMAGES} at most."
        )
    names = "data", "fsdp", "context", "tensor"
    return jax.make_mesh((data, *flags), names, (AxisType.Auto,) * 4)


def main(argv=None):
    args = arguments(argv)
    # After how long who waits for a dead process, as in saving, ends at the latest.
    seconds = {"heartbeat_timeout_seconds": 30}
    if args.distributed:
        address, count, index = args.distributed
        jax.distributed.initialize(address, int(count), int(index), **seconds)
    elif args.distributed is not None:
        jax.distributed.initialize(**seconds)
    mesh = make_mesh(args)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        train(args, mesh)


if __name__ == "__main__":
    try:
        main()
    except (Exception, KeyboardInterrupt):
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: it would wait for the others, and they for it
