"""ResNet-8 in PyTorch, as `train_speed.py` runs it in an interpreter that has torch, epoch by epoch when asked.

It speaks as `train_speed.Turns` does; the interpreter with torch has none of our modules.

Its best setting on a CPU: channels last, bfloat16 autocast, torch.compile. The same network, batch, optimizer and data as
trimline's.
"""

import argparse
import json
import sys
import time

import torch
from torch import nn


def conv(inside: int, outside: int, kernel: int = 3, stride: int = 1, *, relu: bool = True) -> nn.Sequential:
    made = [nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outside)]
    return nn.Sequential(*made, nn.ReLU()) if relu else nn.Sequential(*made)


class Stage(nn.Module):
    """Two convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv(inside, outside, 3, stride), conv(outside, outside, relu=False)
        changes = stride != 1 or inside != outside
        self.shortcut = nn.Conv2d(inside, outside, 1, stride) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures (batch, inside, height, width) to (batch, outside, height / stride, width / stride)."""
        return torch.relu(self.shortcut(x) + self.b(self.a(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--updates", type=int, default=50, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = nn.Sequential(
        conv(3, 16),
        Stage(16, 16, 1),
        Stage(16, 32, 2),
        Stage(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, eps=1e-7, fused=True)
    loss = nn.CrossEntropyLoss()
    x = torch.rand(options.batch * 20, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (options.batch * 20,))
    forward = network if options.eager else torch.compile(network)

    def update(at: int) -> None:
        rows = slice(at % 20 * options.batch, (at % 20 + 1) * options.batch)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            given = forward(x[rows])
        loss(given.float(), y[rows]).backward()
        optimizer.step()

    for at in range(options.updates):
        update(at)
    print("turn []", flush=True)
    for _ in range(options.epochs):
        sys.stdin.readline()
        started = time.perf_counter(), time.process_time()
        for at in range(options.updates):
            update(at)
        took = time.perf_counter() - started[0], time.process_time() - started[1]
        examples = options.updates * options.batch
        said = {name: 1e6 * each / examples for name, each in zip(("wall", "processor"), took, strict=True)}
        print("turn " + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
