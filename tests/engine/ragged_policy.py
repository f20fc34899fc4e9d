"""A family whose conditionings are as long as their texts: one row of numbers for each word."""

import torch

from tempflow.models.guidance import GuidedPolicy

CELL, WIDTH, LONGEST = 8, 4, 9


class WordDenoiser(torch.nn.Module):
    """v depends on the latent, sigma and the words, with attention over them, so on how many there
    are."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.mix, self.query, self.value = (
            torch.nn.Parameter(torch.randn(3, n, generator=generator)) for n in (3, WIDTH, WIDTH)
        )

    def forward(self, x, sigma, text, known=None):
        pixels = x.flatten(2).transpose(1, 2)  # [n, HW, 3]
        scores = pixels @ self.query @ text.transpose(1, 2)
        attention = (
            scores if known is None else scores.masked_fill(~known[:, None], -torch.inf)
        ).softmax(2)
        found = (
            torch.tanh(pixels @ self.mix)
            + attention @ text @ self.value.T
            + sigma[:, None, None] * pixels
        )
        return found.transpose(1, 2).reshape(x.shape)


class RaggedPolicy(GuidedPolicy):
    """embedded, rows_seen: the examples that were embedded, and the rows of each forward."""

    ragged = True

    def __init__(self):
        self.device, self.embedded, self.rows_seen = torch.device("cpu"), [], []
        self._denoiser = WordDenoiser().requires_grad_(False)

    def denoiser(self):
        return self._denoiser

    @staticmethod
    def size_multiple(vae_config):
        return CELL

    def embed(self, examples):
        (example,) = examples
        self.embedded.append(example)
        rows = [
            [len(word), ord(word[0]) / 100, n, 1.0]
            for n, word in enumerate(example.text.split() or [" "])
        ]
        return {"text": torch.tensor([rows]).sin()}

    def empty_embeddings(self, count):
        return {"text": torch.empty(count, LONGEST, WIDTH)}

    def latent_shape(self, size):
        return 3, size.height // CELL, size.width // CELL

    def sigmas(self, num_steps, size):
        return torch.linspace(1, 0, num_steps + 1)

    def _join(self, negative, positive):
        texts = [*negative["text"], *positive["text"]]
        known = [torch.ones(len(text), dtype=torch.bool) for text in texts]
        return {
            name: torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
            for name, some in (("text", texts), ("known", known))
        }

    def _forward(self, denoiser, x, sigma, conditioning, size):
        self.rows_seen.append(len(x))
        return denoiser(x, sigma, conditioning["text"], conditioning.get("known"))

    def expected(self, example, x, sigma, guidance):
        """The velocity of one row, put together by hand."""

        def forward(one):
            return self._denoiser(x[None], sigma[None], self.embed([one])["text"])[0]

        if guidance <= 1:
            return forward(example)
        negative = forward(self.opposed(example))
        return negative + guidance * (forward(example) - negative)

    def _decode(self, latents, size):
        return latents.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)


class Sharded:
    """A denoiser in an engine of ZeRO-3."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def zero_optimization_partition_weights(self):
        return True

    def __call__(self, *args, **kwargs):
        return self.denoiser(*args, **kwargs)
