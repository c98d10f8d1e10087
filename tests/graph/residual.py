"""Small networks whose residual stream is normalised by a mean of squares."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class WrittenOut(nn.Module):
    """RMSNorm as Hugging Face writes it; ``one`` is added to the weight."""

    def __init__(self, size: int, one: float = 0.0) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.one = nn.Parameter(torch.ones(size)), 1e-2, one

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.one + self.weight.to(x.dtype)) * x if self.one else self.weight * x.to(x.dtype)


class Divided(WrittenOut):
    """The mean of ``x * x``, and a division by its root, which is at least the epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x * x).mean(-1, keepdim=True).clamp_min(self.variance_epsilon).sqrt() * self.weight


class MeanOfSizes(WrittenOut):
    """Divided by the mean of absolute values; the epsilon stands outside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.abs().mean(-1, keepdim=True) + self.variance_epsilon).reciprocal())


class Called(WrittenOut):
    """The function, with a weight that is applied afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.variance_epsilon) * self.weight


class FixedLength(WrittenOut):
    """A length, which needs no correction where channels are zero."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * 4.0 * self.weight


class Numbered(WrittenOut):
    """The epsilon is written into the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2))


class Beforehand(WrittenOut):
    """The weight multiplies before the mean's factor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class BeforehandMoved(WrittenOut):
    """A move lies between the weight and the division."""

    def forward(self, x: Tensor) -> Tensor:
        root = (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return (self.weight * x).unsqueeze(0).squeeze(0) / root


class SumBySize(WrittenOut):
    """The mean is written as a sum over the number of channels."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.pow(2).sum(-1, keepdim=True) / x.shape[-1]
        return self.weight * (x * torch.rsqrt(mean + self.variance_epsilon))


class SumByNumber(WrittenOut):
    """The number that divides the sum does not follow the channels."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.divisor = float(size)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.pow(2).sum(-1, keepdim=True) / self.divisor
        return self.weight * (x * torch.rsqrt(mean + self.variance_epsilon))


class BeforehandBorrowed(WrittenOut):
    """What the weight multiplies is also read without the mean's factor."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x
        return y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) + y


class Borrowed(WrittenOut):
    """The weight is also used in another way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight


class Unscaled(WrittenOut):
    """No weight makes up for the mean."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Shifted(WrittenOut):
    """The mean of squares is mixed with another value of another length."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean + mean.sqrt() + self.variance_epsilon)


class Block(nn.Module):
    """A gated MLP behind a norm."""

    def __init__(self, size: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(size)
        self.gate, self.up = (nn.Linear(size, 2 * size, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Language(nn.Module):
    """A token embedding, two blocks, a last norm and a head, which may be tied to the embedding."""

    def __init__(self, norm: Norm, size: int = 12, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, size)
        self.blocks = nn.ModuleList(Block(size, norm) for _ in range(2))
        self.norm, self.head = norm(size), nn.Linear(size, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GlobalResponse(nn.Module):
    """The norm of ConvNeXt V2 between the layers of an MLP over channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 8, 3), nn.Linear(8, 16), nn.Linear(16, 8)
        self.weight, self.bias = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(16))
        self.eps, self.head = 1e-2, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = F.gelu(self.up(x))
        length = y.norm(p=2, dim=(1, 2), keepdim=True)
        share = length / (length.mean(dim=-1, keepdim=True) + self.eps)
        y = y + torch.addcmul(self.bias.view(1, 1, 1, -1), self.weight.view(1, 1, 1, -1), y * share)
        return self.head(x + self.down(y))


class Autocast(Language):
    """The same in a region under autocast, as trainers wrap a forward. Float64 stays what it is there."""

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(tokens)
