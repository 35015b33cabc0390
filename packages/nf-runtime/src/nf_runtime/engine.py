"""One model on one device: requests in, tokens out."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from nf_kvcache.copier import make_copier
from nf_runtime.config import EngineConfig
from nf_runtime.device import name_device
from nf_runtime.device_peaks import measure_peaks
from nf_runtime.engine_start import agree_on_memory, require_invariance, start_ranks
from nf_runtime.engine_types import EngineInfo, EngineRequest, EngineStats, TokenOutput
from nf_runtime.iteration_output import IterationOutput
from nf_runtime.loaded_model import load_model
from nf_runtime.logprobs import RowLogprobs
from nf_runtime.loop import IterationLoop, IterationRunner, LoopStats
from nf_runtime.pipeline.node_cost import NodeCosts
from nf_runtime.pipeline.plan import DevicePeaks
from nf_runtime.pipeline.plan_store import PlanTarget, find_policy, model_fingerprint
from nf_runtime.pipeline.utilisation import Utilisation
from nf_runtime.ranks.runner import GroupCopier, GroupRunner
from nf_runtime.replay.recorded_loop import RecordedLoop
from nf_runtime.replay.recorder import Recorder
from nf_runtime.sampler import RequestSampling, Sampler
from nf_runtime.sampling_params import SamplingParams
from nf_runtime.scheduling import make_scheduler
from nf_scheduler import Progress, Request, TokenEvent


@dataclass(slots=True)
class _Live:
    """A live request's prompt log-probabilities, gathered chunk by chunk."""

    wants_prompt_logprobs: bool
    prompt_logprobs: list[RowLogprobs] = field(default_factory=list)


class Engine:
    """One model in this process: on one device, or with processes that have further parts of it.

    Not thread-safe.

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
        self._group = start_ranks(config) if config.tensor_parallel_size > 1 else None
        self._live: dict[str, _Live] = {}
        self._untold: list[TokenOutput] = []  # what came between two steps
        try:
            self._start(config)
        except BaseException:
            self._end_ranks()
            raise
        if self._group is not None:
            self._group.started()

    def _start(self, config: EngineConfig) -> None:
        clock, group, phases = self._clock, self._group, {}
        started = clock()
        loaded = load_model(config, check=(lambda: None) if group is None else group.check)
        config, model, device = loaded.config, loaded.model, loaded.device
        if config.deterministic:
            require_invariance(loaded.graph, loaded.operations, config.tensor_parallel_size)
        weight_bytes = loaded.weights.num_bytes
        if group is not None:
            weight_bytes += sum(group.collect("loaded"))
        phases["weights"] = clock() - started

        started = clock()
        self.config, self._loaded = config, loaded
        self.graph = loaded.graph
        self._find_policy = partial(
            find_policy,
            graph=self.graph,
            model=model,
            device=name_device(device),
            dtype=str(loaded.dtype).removeprefix("torch."),
            plan_dir=config.plan_dir,
            tensor_parallel_size=config.tensor_parallel_size,
        )
        self.plan_target = PlanTarget(
            model_fingerprint(model),
            name_device(device),
            str(loaded.dtype).removeprefix("torch."),
            config.tensor_parallel_size,
        )
        policy = self._find_policy(config.overlap)
        budgets = policy.budgets(config.batch_tokens)
        num_pages, max_model_len = agree_on_memory(loaded, policy, group)
        communicator, copier = None, None
        if group is not None:
            communicator = group.connect(device, num_pages=num_pages, max_model_len=max_model_len)
            copier = GroupCopier(make_copier(device), group)
        recorder = None if config.replay_log_dir is None else Recorder(config, clock=clock)
        self._recorder = recorder
        self.kv_cache = loaded.make_kv_cache(num_pages, recorder=recorder, copier=copier)
        self.scheduler = make_scheduler(
            config,
            self.kv_cache,
            max_model_len,
            clock if recorder is None else recorder.clock,
            budgets=budgets,
        )
        phases["kv_cache"] = clock() - started

        started = clock()
        self.sampler = Sampler(
            loaded.operations,
            vocab_size=model.vocab_size,
            max_requests=config.max_num_seqs,
            device=device,
        )
        self.executor = loaded.make_executor(
            self.kv_cache.layers,
            self.sampler,
            max_model_len,
            communicator=communicator,
            policy=policy,
            timeline_every=config.timeline_every,
        )
        runner: IterationRunner = self.executor
        if group is not None:
            self.executor.before_launch = group.launch
            runner = GroupRunner(self.executor, group)
            group.collect("ready")
        phases["compile"] = clock() - started

        started = clock()
        lag = 1 if config.async_scheduling else 0
        parts = self.scheduler, self.kv_cache, runner
        if recorder is None:
            self.loop = IterationLoop(*parts, lag=lag, clock=clock)
        else:
            recorder.begin(config, self.kv_cache, max_model_len, budgets)
            self.loop = RecordedLoop(recorder, *parts, lag=lag)
        self.info = EngineInfo(
            model=config.model,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(device),
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            num_pages=num_pages,
            page_size=config.page_size,
            eos_token_ids=model.eos_token_ids,
            weight_bytes=weight_bytes,
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
            cuda_graph_steps=self.executor.device_graphs.launches,
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
        self.sampler.add(
            request.request_id, RequestSampling(params, request.seed, prompt, stop_ids)
        )
        self._live[request.request_id] = _Live(wants_prompt_logprobs)

    def set_overlap(self, overlap: str) -> None:
        """Run iterations by other plans, from the next one on; requests go on.

        From then on batches have as many tokens as these plans want (`Bucket.token_budget`).

        Args:
            overlap: As `EngineConfig.overlap`.

        Raises:
            PlanError: It names no plan, or one that does not fit; then all stays as it was.
        """
        policy = self._find_policy(overlap)
        budgets = policy.budgets(self.config.batch_tokens)
        self.executor.set_policy(policy)
        if self._group is not None:
            self._group.set_policy(policy.plan_set)
        self.loop.set_budgets(budgets)

    def node_costs(self) -> NodeCosts:
        """What nano-operations ask of the device."""
        model, shard = self._loaded.model, self._loaded.shard
        return NodeCosts(
            self.graph,
            head_dim=model.head_dim,
            element_bytes=self._loaded.dtype.itemsize,
            experts=len(shard.experts(model)),
            expert_features=len(shard.expert_inner(model)),
            ranks=shard.size,
        )

    def measure_peaks(self) -> DevicePeaks:
        """What the device, and the network between ranks, can do at most; takes some seconds.

        Raises:
            EngineDeadError: A rank has ended.
        """
        peaks = self.executor.measure(measure_peaks)
        if self._group is None:
            return peaks
        sent = self._group.measure_network(self.executor)
        return peaks.model_copy(update={"sent_per_second": sent})

    def utilisation(self) -> Utilisation:
        """What tells the use of the device, by peaks if the plans were measured beside some."""
        plan_set = self.executor.policy.plan_set
        return Utilisation(self.node_costs(), None if plan_set is None else plan_set.peaks)

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
        self._end_ranks()
        self.kv_cache.close()

    def _end_ranks(self) -> None:
        if self._group is not None:
            self._group.close()

    def watch_ranks(self, watcher: Callable[[str], None]) -> None:
        """Have a function called, on another thread, with the reason, when another rank ends.

        The engine can do nothing any more then, and says so when it is asked to.
        """
        if self._group is not None:
            self._group.watch(watcher)

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
            self.sampler.remove(event.request_id)
        return output

    def _warm_up(self) -> None:
        """Run one prompt through, so that the first user does not wait for lazy initialization."""
        self.add(
            EngineRequest("warm-up", [0], SamplingParams(temperature=0.0, max_tokens=1), seed=0)
        )
        while self.has_work:
            self.step()
        self.loop.stats = LoopStats()
        self.executor.timeline.reset()
