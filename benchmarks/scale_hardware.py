"""Costs of a worker on GPUs, from the manufacturer's figures and a few assumptions, which are varied (docs/concepts/scale.md).

A token takes 2 P floating-point operations to read, and 4 P to learn from: the base is frozen, so only the gradients of the
activations are computed, not those of its weights. A decoding step reads all weights once, and the keys and values of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from scale_work import Costs

from selfeval.planner.stage_times import Lengths

NODE = 8
"""GPUs of a machine."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, and the network of its machine.

    Attributes:
        flops: floating-point operations per second in bf16, without sparsity.
        bandwidth, memory: of its memory, in bytes per second and in bytes.
        link, network: bytes per second in one direction, to the GPUs of its machine and to other machines.
        sources: data sheets.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    sources: tuple[str, ...]


GPUS = (
    Gpu(
        "A100",
        312e12,
        2.039e12,
        80e9,
        300e9,
        25e9,
        (
            "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf",
            "https://docs.nvidia.com/dgx/dgxa100-user-guide/introduction-to-dgxa100.html",
        ),
    ),
    Gpu(
        "H100",
        989.5e12,
        3.35e12,
        80e9,
        450e9,
        50e9,
        (
            "https://www.nvidia.com/en-us/data-center/h100/",
            "https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html",
        ),
    ),
)
"""SXM cards of 80 GB, in machines with a network card of 200 and 400 Gbit/s per GPU. The data sheet of the H100 has
figures with sparsity, which are twice as high; the links have those of both directions together."""


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama-like model: gated feed-forward layers, grouped keys and values, untied embeddings."""

    name: str
    layers: int
    hidden: int
    inner: int
    keys: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Weights of the base, with two norms per layer and one at the end."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.keys
        layer = attention + 3 * self.hidden * self.inner + 2 * self.hidden
        return 2 * self.vocabulary * self.hidden + self.layers * layer + self.hidden

    def adapter(self, rank: int) -> int:
        """Return the weights of an adapter on all linear layers: rank x (inputs + outputs) of each."""
        return self.layers * rank * (9 * self.hidden + 2 * self.keys + 3 * self.inner)

    @property
    def cache(self) -> int:
        """Bytes of the keys and values of a token in 16 bits."""
        return 2 * 2 * self.layers * self.keys


MODELS = (
    Model("7B", 32, 4096, 14336, 1024, 32768),
    Model("70B", 80, 8192, 28672, 1024, 128256),
)
"""Mistral-7B v0.3 and Llama-3.1-70B."""


@dataclass(frozen=True)
class Setup:
    """A model on the cards of a worker.

    Attributes:
        cards: GPUs of a worker. Their layers work one after another, so they add memory and no speed.
        checkpointing: whether the backward pass computes the layers again: 6 P operations per token in place of 4 P.
    """

    model: Model
    precision: str
    cards: int
    checkpointing: bool

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.precision}, {self.cards} GPU{'s' if self.cards > 1 else ''} per worker"

    @property
    def weights(self) -> float:
        """Bytes of the base."""
        return self.model.parameters * {"bf16": 2.0, "nf4": 0.57}[self.precision]

    @property
    def traffic(self) -> float:
        """Bytes of a pass: the weights; those of nf4 are also written in 16 bits for the product, and read again."""
        return self.weights + (4.0 * self.model.parameters if self.precision == "nf4" else 0.0)


SETUPS = (
    Setup(MODELS[0], "bf16", 1, checkpointing=False),
    Setup(MODELS[1], "nf4", 1, checkpointing=True),
    Setup(MODELS[1], "bf16", 4, checkpointing=True),
)


@dataclass(frozen=True)
class Assumed:
    """Assumptions about software and machines, none of which was measured on a GPU.

    Attributes:
        compute, memory: shares of the peak that passes and decoding steps reach.
        launch: seconds per layer to launch the kernels of a pass, which passes of few tokens wait for.
        starting: seconds from the start of a process until it loads the model.
        disk: bytes per second at which a worker loads its copy of the base.
        shared: bytes per second at which all workers together read it. Default: each has its own disk.
        written, hashed: bytes per second at which checkpoints are written and hashed.
        latency, object_latency: seconds of a message of nccl, and of gloo.
        object_bandwidth: bytes per second of gloo.
        rank: rank of the adapters.
    """

    compute: float = 0.4
    memory: float = 0.6
    launch: float = 5e-4
    starting: float = 30.0
    disk: float = 2e9
    shared: float | None = None
    written: float = 1e9
    hashed: float = 5e8
    latency: float = 1e-5
    object_latency: float = 5e-5
    object_bandwidth: float = 1e9
    rank: int = 16


def costs_on(
    gpu: Gpu, setup: Setup, assumed: Assumed, lengths: Lengths, workers: int, *, driver: float, handled: float
) -> Costs:
    """Return the costs of a worker.

    Args:
        gpu: its cards.
        setup: the model on them.
        assumed: the assumptions.
        lengths: of the texts; keys and values are those of a prompt with half of a reply.
        workers: number of workers, which decides between link and network.
        driver, handled: measured on a CPU, since neither uses a GPU.
    """
    model, rate = setup.model, assumed.compute * gpu.flops
    launches, moved = model.layers * assumed.launch, setup.traffic / (assumed.memory * gpu.bandwidth)
    directions = 3 if setup.checkpointing else 2
    adapter = model.adapter(assumed.rank)
    context = lengths.reply_prompt + lengths.reply / 2
    # The weights of the base in bf16 are read while the tokens of a pass are computed; those of nf4 are unpacked first.
    unpacked = moved if setup.precision == "nf4" else 0.0
    return Costs(
        step=launches + moved,
        row=2 * model.parameters / rate + model.cache * context / (assumed.memory * gpu.bandwidth),
        reading=launches + unpacked,
        read=2 * model.parameters / rate,
        learning=directions * (launches + unpacked),
        learn=2 * directions * model.parameters / rate,
        # Weight, gradient and two moments in fp32, read and written, and the gradient copied into one message and back.
        optimizer=40 * adapter / (assumed.memory * gpu.bandwidth),
        handled=handled,
        driver=driver,
        start=assumed.starting + _loading(setup.weights, assumed, workers),
        save=12 * adapter * (1 / assumed.written + 1 / assumed.hashed),
        gradients=4 * adapter,
        bandwidth=gpu.link if workers * setup.cards <= NODE else gpu.network,
        latency=assumed.latency,
        object_bandwidth=assumed.object_bandwidth,
        object_latency=assumed.object_latency,
    )


def _loading(size: float, assumed: Assumed, workers: int) -> float:
    """Return the time to load the base; all workers load at the same time."""
    if assumed.shared is None:
        return size / assumed.disk
    return max(size / assumed.disk, workers * size / assumed.shared)
