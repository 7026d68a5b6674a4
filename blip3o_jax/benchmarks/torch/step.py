"""The release's training step (spec 3.2, 11.1): the CLIP encoder in every step, one pass over prompt and queries with
gradients through both and activations computed again, logits over the vocabulary and their unused cross entropy. Those
of the DiT are kept, for diffusers cannot compute them again: a hundredth of the step less to do than the release."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from ml_collections import ConfigDict
from torch.nn import functional as F

from blip3o_jax.benchmarks.torch import parts
from blip3o_jax.benchmarks.torch.bridge import finished, nchw, tensor
from blip3o_jax.diffusion import flow_matching
from blip3o_jax.models.blip3o import Blip3oConfig
from blip3o_jax.training import optimizers
from blip3o_jax.training.step import streams
from blip3o_jax.types import Batch, Params


def steps(
  config: ConfigDict, cfg: Blip3oConfig, params: Params, batches: list[Batch], ways: Mapping[str, Callable]
) -> dict[str, "Step"]:
  """A step for each of `ways` to wrap a network. What does not train they share: twice it might not fit a GPU."""
  language = parts.open_backbone(cfg, params["backbone"], config.compute_dtype)
  language.gradient_checkpointing_enable({"use_reentrant": False})
  language.model.language_model.train()  # nothing in it is random
  encoder = parts.open_encoder(cfg, params["clip"], config.compute_dtype)
  return {name: Step(config, cfg, params, iter(batches), wrap, language, encoder) for name, wrap in ways.items()}


class Step:
  """One step a call, on the next of `batches`, from our weights and with our random numbers."""

  def __init__(
    self,
    config: ConfigDict,
    cfg: Blip3oConfig,
    params: Params,
    batches: Iterator[Batch],
    wrap: Callable,
    language: torch.nn.Module,
    encoder: torch.nn.Module,
  ):
    self._cfg, self._config, self._batches = cfg, config, batches
    self._text, self._head = language.model.language_model, language.lm_head
    dit = parts.open_dit(cfg, params["dit"], "float32").requires_grad_(True)
    self._encode, self._read, self._draw = wrap(encoder), wrap(self._text), wrap(dit)
    self._queries = tensor(params["queries"]["latent_queries"]).float().requires_grad_(True)
    self._trained = [p for name, p in dit.named_parameters() if not name.endswith("pad_token")] + [self._queries]
    o = config.optimizer
    settings = {"betas": (o.b1, o.b2), "eps": o.eps, "weight_decay": o.weight_decay}
    self._adam = torch.optim.AdamW(self._trained, **settings)
    self._rate = optimizers.make_schedule(config.schedule, o.learning_rate, config.steps)
    self._dtype = self._head.weight.dtype
    self.losses: list[torch.Tensor] = []

  def __call__(self) -> Any:
    batch, number = next(self._batches), len(self.losses)
    with torch.autocast(self._queries.device.type, self._dtype, enabled=self._dtype != torch.float32):
      loss = self._loss(batch, number)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._trained, self._config.clip_norm)
    for group in self._adam.param_groups:
      group["lr"] = float(self._rate(number))
    self._adam.step()
    self._adam.zero_grad()  # the other steps take their turns meanwhile
    self.losses.append(loss.detach())
    return finished(loss)

  def _loss(self, batch: Batch, number: int) -> torch.Tensor:
    tokens, mask, positions = (tensor(batch[name]) for name in ("tokens", "token_mask", "positions"))
    tokens, (b, length), q = tokens.long(), tokens.shape, self._cfg.queries
    with torch.no_grad():
      x1 = parts.features_of(self._encode, nchw(batch["pixels"]), self._dtype)
      words = self._text.embed_tokens(tokens)
    start = torch.where(mask[:, None], positions, -1).amax(-1, keepdim=True) + 1
    hidden = self._read(
      inputs_embeds=torch.cat([words, self._queries.to(words.dtype).expand(b, -1, -1)], dim=1),
      attention_mask=torch.cat([mask, mask.new_ones(b, q)], dim=1).long(),
      position_ids=torch.cat([positions, start + torch.arange(q, device=start.device)], dim=-1).transpose(0, 1).long(),
      use_cache=False,
    ).last_hidden_state
    with torch.no_grad():  # computed and not trained on
      logits = self._head(hidden)[:, : length - 1].float()
      F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:].masked_fill(~mask[:, 1:], -100))

    keep, sigma, t, noise = map(
      tensor, _draws(self._config.seed, number, b, self._cfg, str(self._config.compute_dtype))
    )
    x1 = x1.transpose(1, 2).reshape(b, -1, *self._cfg.dit.grid)
    noise, sigma = noise.permute(0, 3, 1, 2), sigma.reshape(-1, 1, 1, 1)
    mixed = ((1 - sigma) * x1.float() + sigma * noise.float()).to(x1.dtype)
    velocity = self._draw(mixed, t, hidden[:, length:] * keep)
    return F.mse_loss(velocity.float(), (noise - x1).float())


def _draws(seed: int, number: int, batch: int, cfg: Blip3oConfig, dtype: str) -> tuple[jax.Array, ...]:
  """The random numbers of our step (objectives.generation): which conditions stay [B, 1, 1], sigma, t [B], noise."""
  rngs = jax.random.split(jax.random.fold_in(streams(seed)[1], number), 3)
  keep = flow_matching.drop_condition(rngs[2], jnp.ones((batch, 1, 1), dtype), 0.1)
  sigma, t = flow_matching.sample_times(rngs[0], batch)
  noise = jax.random.normal(rngs[1], (batch, *cfg.dit.grid, cfg.dit.in_channels)).astype(dtype)
  return keep, sigma, t, noise
