"""How decoding carries to machines that are not here: a count of what a step does, on a simple model of a larger machine.

Nothing is measured. A launch takes as long as its busiest thread streams weights, at a core's bandwidth or its share of
the sockets', whichever is less; plus what the executor's counters cost: a thread that has finished its share looks at
the claim counter of each other share that has units, adds what it did to one counter that all threads add to, and the
next launch waits for that counter. Each of these is a cache line that moves between cores, and the adding is one thread
after another. Threads beyond a launch's units find nothing to claim.

With memory placed by first touch, a thread's share of every matrix is in its own socket's memory; otherwise all weights
are taken to lie in one.
"""

from __future__ import annotations

from dataclasses import dataclass

from .report import Report, arguments

THREADS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Machine:
    """What the model knows of a machine."""

    cores_per_socket: int
    core_bandwidth: float  # GB/s
    socket_bandwidth: float  # GB/s
    near: float  # ns for a cache line to move between cores of a socket
    far: float  # ns between sockets

    def sockets(self, threads: int) -> int:
        return -(-threads // self.cores_per_socket)

    def line(self, threads: int) -> float:
        """Seconds for a line to come from another of these threads, on average."""
        if threads == 1:
            return 0.0
        return (self.near if self.sockets(threads) == 1 else (self.near + self.far) / 2) * 1e-9


@dataclass(frozen=True)
class Launch:
    """Units, bytes of weights in each, and how many launches like it share one wait."""

    units: int
    unit_bytes: float
    waits: bool = True


@dataclass(frozen=True)
class Shape:
    """A Llama's decode step."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bits: float  # of a weight in tiles
    output_bits: float

    def launches(self) -> list[Launch]:
        """As `nn.cpu_lowering` records them, for one token with a short context."""

        def matrix(rows: int, columns: int, waits: bool = True, bits: float = self.bits) -> Launch:
            return Launch(-(-rows // 16), 16 * columns * bits / 8, waits)

        one = Launch(1, 0)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = [
            one,  # norm
            matrix(q, self.hidden),
            matrix(kv, self.hidden, waits=False),
            matrix(kv, self.hidden, waits=False),
            one,  # rotation and cache
            Launch(self.kv_heads, 0),  # attention
            one,  # quantisation
            matrix(self.hidden, q),
            one,  # norm
            Launch(self.intermediate // 32, 2 * 32 * self.hidden * self.bits / 8),  # gate and up
            matrix(self.hidden, self.intermediate),
        ]
        return [one, *layer * self.layers, one, matrix(self.vocab, self.hidden, bits=self.output_bits)]


SHAPES = (
    Shape("SmolLM2-135M, Q4_1", 30, 576, 1536, 9, 3, 64, 49152, 5.0, 8.5),
    Shape("Llama-3.2-1B, Q4_K", 16, 2048, 8192, 32, 8, 64, 128256, 4.625, 6.5625),
    Shape("Llama-3.1-8B, Q4_K", 32, 4096, 14336, 32, 8, 128, 128256, 4.625, 6.5625),
)


def launch_seconds(launch: Launch, threads: int, machine: Machine, first_touch: bool) -> tuple[float, float]:
    """Streaming, and synchronising."""
    busy = min(launch.units, threads)
    sockets = machine.sockets(busy) if first_touch else 1
    rate = min(machine.core_bandwidth, machine.socket_bandwidth * sockets / busy) * 1e9
    streaming = -(-launch.units // threads) * launch.unit_bytes / rate
    line = machine.line(threads)
    scan, adding, seeing = (busy - 1) * line, busy * line, line if launch.waits else 0.0
    return streaming, scan + adding + seeing


def step(shape: Shape, threads: int, machine: Machine, first_touch: bool = True) -> tuple[float, float]:
    """Seconds of a decode step: streaming, and synchronising."""
    parts = [launch_seconds(launch, threads, machine, first_touch) for launch in shape.launches()]
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--cores-per-socket", type=int, default=64)
    parser.add_argument("--core-bandwidth", type=float, default=35.0, metavar="GB/s", help="of one core alone (default: 35)")
    parser.add_argument("--socket-bandwidth", type=float, default=400.0, metavar="GB/s", help="of a socket (default: 400)")
    parser.add_argument("--near", type=float, default=50.0, metavar="NS", help="for a cache line between cores of a socket (default: 50)")
    parser.add_argument("--far", type=float, default=150.0, metavar="NS", help="for a cache line between sockets (default: 150)")
    args = parser.parse_args()
    machine = Machine(args.cores_per_socket, args.core_bandwidth, args.socket_bandwidth, args.near, args.far)
    columns = {
        "model": "model",
        "threads": "threads",
        "tokens_per_sec": "tok/s",
        "percent": "% of bandwidth bound",
        "sync": "% in counters",
    }
    report = Report("scaling", {**columns, "one_node": "tok/s, memory of one socket"})
    report.notes.append(f"Computed, not measured: {machine}.")
    for shape in SHAPES:
        size = sum(launch.units * launch.unit_bytes for launch in shape.launches())
        for threads in THREADS:
            streaming, sync = step(shape, threads, machine)
            bandwidth = min(machine.core_bandwidth * threads, machine.socket_bandwidth * machine.sockets(threads)) * 1e9
            report.add(
                model=shape.name,
                threads=threads,
                tokens_per_sec=1 / (streaming + sync),
                percent=100 * size / bandwidth / (streaming + sync),
                sync=100 * sync / (streaming + sync),
                one_node=1 / sum(step(shape, threads, machine, first_touch=False)),
            )
    report.finish(args)


if __name__ == "__main__":
    main()
