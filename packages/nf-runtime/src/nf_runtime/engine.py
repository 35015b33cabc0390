"""One model on one device: requests in, tokens out."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from nf_kernels import ops
from nf_runtime.checkpoint import Checkpoint
from nf_runtime.chrome_trace import chrome_trace
from nf_runtime.config import EngineConfig
from nf_runtime.device import measure_memory, name_device, pick_device, pick_dtype
from nf_runtime.engine_types import EngineInfo, EngineRequest, EngineStats, TokenOutput
from nf_runtime.errors import ModelLoadError
from nf_runtime.executor import Executor
from nf_runtime.graph import LayerGraph
from nf_runtime.iteration_output import IterationOutput
from nf_runtime.kv_tiers import make_kv_cache
from nf_runtime.logprobs import RowLogprobs
from nf_runtime.loop import IterationLoop, LoopStats
from nf_runtime.memory_plan import plan_memory
from nf_runtime.model_source import find_model
from nf_runtime.models import decoder_graph, find_family, read_config
from nf_runtime.pipeline.node_cost import NodeCosts
from nf_runtime.pipeline.plan_store import PlanTarget, find_policy, model_fingerprint
from nf_runtime.replay.recorded_loop import RecordedLoop
from nf_runtime.replay.recorder import Recorder
from nf_runtime.rope import cos_sin_table
from nf_runtime.sampler import RequestSampling, Sampler
from nf_runtime.sampling_params import SamplingParams
from nf_runtime.scheduling import make_scheduler
from nf_runtime.weights import load_weights, make_weights, pack_weights
from nf_scheduler import Progress, Request, TokenEvent

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Live:
    """A live request's prompt log-probabilities, gathered chunk by chunk."""

    wants_prompt_logprobs: bool
    prompt_logprobs: list[RowLogprobs] = field(default_factory=list)


class Engine:
    """One model on one device, in this process. Not thread-safe.

    Args:
        config: How to set it up.
        clock: Seconds; for ledgers and phases.

    Raises:
        ModelLoadError: The model cannot be loaded, or does not fit.
    """

    def __init__(
        self, config: EngineConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        phases: dict[str, float] = {}
        started = clock()
        path = find_model(config.model)
        model = read_config(path)
        device = pick_device(config.device)
        config = config.on_device(device.type)
        dtype = pick_dtype(config.dtype, model)
        family = find_family(model.architecture)
        if config.load_format == "dummy":
            weights = make_weights(model, family, dtype=dtype, device=device, seed=config.seed)
        else:
            weights = load_weights(model, family, Checkpoint(path), dtype=dtype, device=device)
        graph = decoder_graph(model)
        operations = ops.load(device, native=config.native_kernels)
        if config.deterministic:
            _require_invariance(graph, operations)
        weights_digest = weights.digest() if config.kv_ssd_dir is not None else ""
        pack_weights(weights, graph, operations)
        phases["weights"] = clock() - started

        started = clock()
        self.config = config
        self._model = model
        self.graph = graph
        self._find_policy = partial(
            find_policy,
            graph=graph,
            model=model,
            device=name_device(device),
            dtype=str(dtype).removeprefix("torch."),
            plan_dir=config.plan_dir,
        )
        self.plan_target = PlanTarget(
            model_fingerprint(model), name_device(device), str(dtype).removeprefix("torch.")
        )
        policy = self._find_policy(config.overlap)
        plan = plan_memory(
            config, model, measure_memory(device), dtype, loaded_weight_bytes=weights.num_bytes
        )
        if plan.problem is not None:
            raise ModelLoadError(f"{plan.problem}; {', or '.join(plan.advice)}")
        for advice in plan.advice:
            _log.warning("%s", advice)
        max_model_len, num_pages = plan.max_model_len, plan.num_pages
        recorder = None if config.replay_log_dir is None else Recorder(config, clock=clock)
        self._recorder = recorder
        self.kv_cache = make_kv_cache(
            config,
            model,
            num_pages,
            dtype=dtype,
            device=device,
            weights_digest=weights_digest,
            numerics=operations.name + (" deterministic" if config.deterministic else ""),
            recorder=recorder,
        )
        self.scheduler = make_scheduler(
            config,
            self.kv_cache,
            max_model_len,
            clock if recorder is None else recorder.clock,
            budgets=policy.budgets(config.batch_tokens),
        )
        phases["kv_cache"] = clock() - started

        started = clock()
        self.executor = Executor(
            graph,
            weights,
            self.kv_cache.layers,
            operations,
            Sampler(
                operations,
                vocab_size=model.vocab_size,
                max_requests=config.max_num_seqs,
                device=device,
            ),
            cos_sin=cos_sin_table(model, max_model_len).to(device),
            page_size=config.page_size,
            max_tokens=config.batch_tokens,
            max_requests=config.max_num_seqs,
            policy=policy,
            asynchronous=config.async_scheduling,
            programs=config.native_programs,
            timeline_every=config.timeline_every,
        )
        phases["compile"] = clock() - started

        started = clock()
        lag = 1 if config.async_scheduling else 0
        parts = self.scheduler, self.kv_cache, self.executor
        if recorder is None:
            self.loop = IterationLoop(*parts, lag=lag, clock=clock)
        else:
            recorder.begin(config, self.kv_cache, max_model_len)
            self.loop = RecordedLoop(recorder, *parts, lag=lag)
        self._live: dict[str, _Live] = {}
        self._untold: list[TokenOutput] = []  # what came between two steps
        self.info = EngineInfo(
            model=config.model,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            num_pages=num_pages,
            page_size=config.page_size,
            eos_token_ids=model.eos_token_ids,
            weight_bytes=weights.num_bytes,
            startup_seconds=phases,
            overlap=policy.describe(config.overlap),
        )
        self._warm_up()
        phases["warm_up"] = clock() - started

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._live or self._untold) or self.scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        """Where the engine stands."""
        cache, scheduler = self.kv_cache.stats(), self.scheduler.stats
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_restoring=scheduler.num_restoring,
            queued_prompt_tokens=scheduler.queued_prompt_tokens,
            tenants=scheduler.tenants,
            kv_pages_total=cache.pages_total,
            kv_pages_used=cache.pages_used,
            kv_pages_cached=cache.pages_cached,
            preemptions=scheduler.preemptions,
            refused=scheduler.refused,
            timeouts=scheduler.timeouts,
            prefix_queried_tokens=cache.queried_tokens,
            prefix_hit_tokens=cache.hit_tokens,
            prefix_hit_tokens_by_tier=cache.hit_tokens_by_tier,
            iterations=self.loop.stats.iterations,
            iterations_ahead=self.loop.stats.iterations_ahead,
            iteration_tokens=self.loop.stats.tokens,
            busy_seconds=self.loop.stats.busy_seconds,
            last_step_time=self.loop.stats.last_commit_time,
            overlap_steps=self._overlap_steps(),
            overlap_gain=self.executor.timeline.gain.ratios(),
            lower_tiers=cache.lower,
        )

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: Its id is in use, or it can never fit.
            QueueFull: The queue has no room for it; later it may have.
        """
        name = request.request_id
        if name in self._live or any(output.request_id == name for output in self._untold):
            raise ValueError(f"request_id {name!r} is in use; give each its own")
        if self.scheduler.is_in_flight(name):  # another one of that name, which has ended
            while self.loop.num_in_flight:
                self._untold += self._step(self.loop.settle)
        params, options, timeout = request.params, request.options, request.options.timeout_seconds
        prompt = np.asarray(request.prompt_token_ids, dtype=np.int32)
        room = self.info.max_model_len - len(prompt)
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= frozenset(self.info.eos_token_ids)
        wants_prompt_logprobs = params.prompt_logprobs is not None
        self.loop.add(
            Request(
                request_id=request.request_id,
                prompt_token_ids=prompt,
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                min_tokens=params.min_tokens,
                stop_token_ids=stop_ids,
                reuse_prefix=not wants_prompt_logprobs,
                cache_salt=options.cache_salt,
                priority=options.priority,
                tenant=options.tenant,
                request_class=options.request_class,
                deadline=None if timeout is None else self._clock() + timeout,
                fork_of=request.fork_of,
            )
        )
        self.executor.sampler.add(
            request.request_id, RequestSampling(params, request.seed, prompt, stop_ids)
        )
        self._live[request.request_id] = _Live(wants_prompt_logprobs)

    def set_overlap(self, overlap: str) -> None:
        """Run iterations by other plans, from the next one on; requests go on.

        Args:
            overlap: As `EngineConfig.overlap`.

        Raises:
            PlanError: It names no plan, or one that does not fit; then all stays as it was.
        """
        self.executor.set_policy(self._find_policy(overlap))

    def node_costs(self) -> NodeCosts:
        """What nano-operations ask of the device."""
        return NodeCosts(
            self.graph,
            head_dim=self._model.head_dim,
            element_bytes=getattr(torch, self.info.dtype).itemsize,
            experts=self._model.experts,
            expert_features=self._model.expert_intermediate_size,
        )

    def timeline(self) -> dict[str, Any]:
        """The iterations that were timed lately, as a Chrome trace (`nf_runtime.chrome_trace`)."""
        return chrome_trace(self.executor.timeline.traces)

    def _overlap_steps(self) -> dict[str, dict[str, int]]:
        steps: dict[str, dict[str, int]] = {}
        for (mode, reason), count in self.executor.timeline.steps.items():
            steps.setdefault(mode, {})[reason] = count
        return steps

    def abort(self, request_id: str) -> bool:
        """End a request early; its last output comes with a later `step`. False if not alive."""
        return self.loop.abort(request_id)

    def step(self) -> list[TokenOutput]:
        """Start the next iteration, and give the tokens of one that has ended, if one has.

        When an iteration fails or is interrupted, the requests of all that are in flight end
        (`abort`), told by the next `step`. When all requests wait for KV from a lower tier, it
        waits a moment for that.
        """
        if self._untold:
            untold, self._untold = self._untold, []
            return untold
        return self._step(self.loop.step)

    def _step(self, do: Callable[[], tuple[Progress, IterationOutput | None]]) -> list[TokenOutput]:
        """Have the loop do something; if that fails, end the requests that are in flight."""
        try:
            return self._outputs(*do())
        except BaseException:  # an interrupt as well
            self._untold += self._outputs(self.loop.fail(), None)
            raise

    def settle(self) -> bool:
        """Let KV go on to the lower tiers while there is nothing to `step`.

        Returns:
            Whether some is still on its way.
        """
        return self.loop.sync()

    def close(self) -> None:
        """Bring what KV is on its way to where it is kept, and end. The engine cannot go on."""
        if self._recorder is not None:
            self._recorder.close()
        self.executor.close()
        self.kv_cache.close()

    def _outputs(self, progress: Progress, output: IterationOutput | None) -> list[TokenOutput]:
        """What requests gained, and what the iteration says of it."""
        if output is None:
            return [self._output(event, None) for event in progress]
        for request_id, (start, rows) in output.prompt_logprobs.items():
            live = self._live.get(request_id)
            if live is not None:
                # By position, because a prompt may be computed again after a preemption.
                live.prompt_logprobs[start:] = rows
        return [self._output(event, output.logprobs.get(event.request_id)) for event in progress]

    def _output(self, event: TokenEvent, logprobs: RowLogprobs | None) -> TokenOutput:
        live = self._live[event.request_id]
        output = TokenOutput(
            request_id=event.request_id,
            token_id=event.token_id,
            finish_reason=event.finish_reason,
            stop_token=event.stop_token,
            logprobs=logprobs if event.token_id is not None else None,
            ledger=event.ledger,
        )
        if live.wants_prompt_logprobs:
            output.prompt_logprobs = list(live.prompt_logprobs)
            live.wants_prompt_logprobs = False
        if event.end is not None:
            del self._live[event.request_id]
            self.executor.sampler.remove(event.request_id)
        return output

    def _warm_up(self) -> None:
        """Run one prompt through, so that the first user does not wait for lazy initialization."""
        self.add(
            EngineRequest("warm-up", [0], SamplingParams(temperature=0.0, max_tokens=1), seed=0)
        )
        while self.has_work:
            self.step()
        self.loop.stats = LoopStats()


def _require_invariance(graph: LayerGraph, operations: ops.OperationSet) -> None:
    """Refuse operations whose rows depend on what else is in the batch."""
    parts = (graph.prologue, *graph.layers, graph.epilogue)
    needed = {"sample"} | {operation.kind for part in parts for operation in part}
    if varying := sorted(needed - operations.invariant):
        raise ModelLoadError(
            f"deterministic is set, but the {operations.name} operations {', '.join(varying)} "
            f"depend on what else is in the batch; use the native kernels of a CPU, or leave it off"
        )
