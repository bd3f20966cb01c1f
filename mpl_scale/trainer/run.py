"""The loop: phase after phase, step after step, with what is logged, evaluated and saved on the way.

A run that is asked to stop saves at a step boundary and leaves; the same command resumes from there, and ends with
the same weights as a run that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mpl_scale.checkpoint import CheckpointError
from mpl_scale.config import RunConfig
from mpl_scale.data import Quarantine, Splits
from mpl_scale.data.prefetch import Prefetcher
from mpl_scale.data.resident_parts import ResidentParts
from mpl_scale.engine.graph import StepRunner, first_line
from mpl_scale.mesh import Mesh
from mpl_scale.monitor import ControlFiles, Heartbeat, Request, Writers
from mpl_scale.mpl import State
from mpl_scale.mpl.skipping import IN_A_ROW, SkipNonfinite
from mpl_scale.resolve import Resolved
from mpl_scale.trainer.clock import Clock
from mpl_scale.trainer.evaluation import Evaluator, Results
from mpl_scale.trainer.gauge import Gauge
from mpl_scale.trainer.guard import batch_ids, nonfinite_metrics, nonfinite_weights
from mpl_scale.trainer.loading import load_batches
from mpl_scale.trainer.phases import Phase, Weights, build_state, collect_weights
from mpl_scale.trainer.rewind import LossWatch
from mpl_scale.trainer.snapshots import Snapshot, Snapshots
from mpl_scale.trainer.watchdog import Watchdog
from mpl_scale.types import StepMetrics


@dataclass
class Trainer:
    """A run, ready to start.

    stop_requested is asked on every rank at step boundaries; once one says yes, all save and leave together. control
    and heartbeat: on rank 0 only. watchdog: on every rank or on none.
    resolved: what the run's settings mean here. gauge: measures what the main phase costs.
    results collects what was measured at the end of each phase: {"student": {"top1": ...}, "finetuned": ...}.
    """

    run: RunConfig
    splits: Splits
    phases: list[Phase]
    mesh: Mesh
    writers: Writers
    snapshots: Snapshots
    stop_requested: Callable[[], bool]
    resolved: Resolved
    gauge: Gauge
    control: ControlFiles | None = None
    heartbeat: Heartbeat | None = None
    watchdog: Watchdog | None = None
    quarantine: Quarantine = field(default_factory=Quarantine)
    results: dict[str, Results] = field(default_factory=dict)
    seconds: float = 0.0
    global_step: int = 0
    _first: int = 0
    _step: int = 0
    _rewinds: int = 0
    _data_offset: int = 0  # step t of the phase sees the batch of t + this: what a rewind leaves out
    _known: dict[str, Any] | None = None  # what the watch over the loss knew at the snapshot
    _watch: LossWatch | None = None
    _state: State | None = None

    def restore(self, snapshot: Snapshot) -> None:
        """Go on after a snapshot. Nothing is written before; ValueError where it is of another model or phase."""
        names = [phase.name for phase in self.phases]
        if snapshot.phase not in names:
            raise ValueError(f"checkpoint {snapshot.folder} is of phase {snapshot.phase!r}, which the config has not")
        self._first, self._step = names.index(snapshot.phase), snapshot.step
        self._state = self._build(self.phases[self._first], weights={})
        self.snapshots.restore(snapshot, self._state)
        self.results, self.seconds = dict(snapshot.metadata["results"]), snapshot.metadata["seconds"]
        self._rewinds, self._data_offset = (snapshot.metadata.get(name, 0) for name in ("rewinds", "data_offset"))
        self._known = snapshot.metadata.get("loss_watch")
        self.global_step = sum(phase.steps for phase in self.phases[: self._first]) + self._step

    def train(self) -> bool:
        """Run the phases that are left. True at the end, False if asked to stop (state saved)."""
        self._began = time.monotonic()
        self._capture = self.resolved.replayed  # until a capture fails
        self._resident = self._resident_parts()
        self._evaluator = Evaluator(
            self.run.mpl,
            splits=self.splits,
            mesh=self.mesh,
            quarantine=self.quarantine,
            resident=self._resident,
        )
        weights: Mapping[str, Weights] = {}
        state, step, self._state = self._state, self._step, None  # each phase's state is freed before the next's
        for phase in self.phases[self._first :]:
            self._tell("start", phase, step)
            state = state or self._build(phase, weights=weights)
            if phase is self.phases[self._first]:
                self.snapshots.check_room(state)
            if not self._train_phase(phase, state, step):
                return False
            weights = collect_weights(state, mesh=self.mesh)
            state, step, self._rewinds, self._data_offset, self._known = None, 0, 0, 0, None
        self._tell("done", self.phases[-1], self.phases[-1].steps)
        return True

    def _build(self, phase: Phase, *, weights: Mapping[str, Weights]) -> State:
        return build_state(phase, self.run, mesh=self.mesh, weights=weights, resolved=self.resolved)

    def elapsed(self) -> float:
        """Seconds of training, over all restarts."""
        return self.seconds + time.monotonic() - self._began

    def _train_phase(self, phase: Phase, state: State, step: int) -> bool:
        config = self.run.mpl
        if step >= phase.steps:  # a checkpoint of the phase's end
            return True
        loader, guard = self._load(phase, step), config.guard
        self._show_progress(phase, step)
        skipping = SkipNonfinite(phase.method.step, state) if guard.nonfinite == "skip" else None

        def settle() -> None:
            """No thread of this run is at work: the watchdog's calls no device, DALI's have filled their queue."""
            self.snapshots.wait()
            loader.settle()

        def fall_back(line: str) -> None:
            self._capture = False  # nor in the phases that follow
            if run_step.out_of_memory and self.mesh.is_main:
                line += f"; {self.gauge.advice()}"
            self.writers.note(line)

        run_step = StepRunner(
            skipping or phase.method.step,
            state,
            capture=self._capture,
            fall_back=None if config.parallel.graph == "required" else fall_back,
            settle=settle,
        )
        self._watch = None if guard.rewind is None else LossWatch(guard.rewind, step=step, known=self._known)
        every, clock, jumped = config.logging.every, Clock(), None
        try:
            while step < phase.steps:
                with self.gauge.step(phase):
                    with clock.waiting():
                        batch = next(loader)
                    try:
                        metrics = self.gauge(run_step, phase, state, batch)
                    except torch.OutOfMemoryError as error:
                        raise ValueError(
                            f"no memory for step {step + 1} of {phase.name}: {first_line(error)}; {self.gauge.advice()}"
                        ) from error
                    step += 1
                    self.global_step += 1
                    clock.steps += 1
                    if step % every == 0 or step == phase.steps:
                        bad = torch.tensor(float(self.quarantine.count * self.mesh.world), device=self.mesh.device)
                        values = self._averages({**metrics, "bad_images": bad})  # of all ranks together
                        if skipping is not None:
                            self._tell_skipped(skipping, values, phase, state, step)
                        elif guard.nonfinite == "stop" and (found := nonfinite_metrics(values)):
                            self._refuse(found, phase, state, step)
                        values |= clock.rates(phase.labelled + phase.unlabelled)
                        if self.heartbeat is not None:
                            self.heartbeat.images_per_second = values["images_per_second"]
                        self.writers.write(values, phase=phase.name, step=step, global_step=self.global_step)
                        if self._watch is not None and not values.get(IN_A_ROW):  # a skipped step is none
                            jumped = self._watch(values, step=step)
                if jumped is not None:
                    back, jumped = self._go_back(jumped, phase, state, step), None
                    if back < step:
                        loader.close()
                        step, loader = back, self._load(phase, back)
                        self._show_progress(phase, step)
                        continue
                done = self._end_of_step(phase, state, step)
                if done is not None:
                    return done
        finally:
            run_step.close()
            loader.close()
        return True

    def _show_progress(self, phase: Phase, step: int) -> None:
        if self.writers.progress is not None:
            images = phase.labelled + phase.unlabelled
            self.writers.progress.start(phase.name, total=phase.steps, done=step, images_per_step=images)

    def _end_of_step(self, phase: Phase, state: State, step: int) -> bool | None:
        """Evaluate, save, agree to stop. None: continue; True: the phase is over; False: stop."""
        config, last = self.run.mpl, step == phase.steps
        self._tell("train", phase, step)
        every = config.phases.train.evaluate_every if phase.name == "train" else 0
        if last or (every and step % every == 0):
            self._tell("evaluate", phase, step)
            self._evaluate(phase, state, step)
        request = self._agreed_request(step)
        stop = request == Request.STOP
        if last or request or (config.checkpoint.every and self.global_step % config.checkpoint.every == 0):
            self._tell("save", phase, step)
            if config.guard.nonfinite == "stop" and (found := nonfinite_weights(state, mesh=self.mesh)):
                self._refuse(found, phase, state, step)
            self.snapshots.save(
                phase,
                state,
                step=step,
                global_step=self.global_step,
                metadata=self._metadata(),
                wait=last or request != Request.NONE,
                needed=stop or (last and phase is self.phases[-1]),
            )
            if self.control is not None and request:
                self.control.answered(request)
        if stop and not (last and phase is self.phases[-1]):
            self.writers.note(
                f"stopped as asked after step {step} of {phase.name}; the same command resumes from there"
            )
            return False
        self._tell("train", phase, step)
        return True if last else None

    def _metadata(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state."""
        return {
            "results": self.results,
            "seconds": self.elapsed(),
            "config": self.run.resolved(),
            "rewinds": self._rewinds,
            "data_offset": self._data_offset,
            "loss_watch": None if self._watch is None else self._watch.to_save(),
        }

    def _tell(self, doing: str, phase: Phase, step: int) -> None:
        """The heartbeat and the watchdog of what is happening: only training has to end a step in time."""
        if self.heartbeat is not None:
            self.heartbeat.beat(doing, phase=phase.name, step=step, steps=phase.steps, global_step=self.global_step)
        if self.watchdog is None:
            return
        if doing == "train" and step < phase.steps:
            self.watchdog.beat(self.global_step)
        else:
            self.watchdog.rest()

    def _load(self, phase: Phase, step: int) -> Prefetcher:
        """The phase's batches from a step on."""
        start, config = step + self._data_offset, self.run.mpl
        return load_batches(
            phase,
            config,
            splits=self.splits,
            mesh=self.mesh,
            start_step=start,
            quarantine=self.quarantine,
            resident=self._resident,
        )

    def _resident_parts(self) -> ResidentParts:
        """What stays decoded."""
        config = self.run.mpl
        return ResidentParts(
            config.data,
            self.splits,
            image_size=config.model.image_size,
            device=self.mesh.device,
            quarantine=self.quarantine,
            unlabelled=any(phase.unlabelled for phase in self.phases[self._first :]),
            tell=self.writers.note,
        )

    def _tell_skipped(
        self, skipping: SkipNonfinite, values: Mapping[str, float], phase: Phase, state: State, step: int
    ) -> None:
        """Name what was skipped since the last line, and end the run where nothing else happens any more."""
        for number in skipping.news():
            self.writers.note(
                f"step {number + 1} of {phase.name} is skipped: it has NaN or infinity; its batch was "
                f"{self._batch_ids(phase, number + 1)}"
            )
        if values[IN_A_ROW] >= self.run.mpl.guard.max_skipped:
            most = f"mpl_scale.guard.max_skipped = {self.run.mpl.guard.max_skipped}"
            self._refuse([f"{values[IN_A_ROW]:.0f} steps in a row had NaN or infinity ({most})"], phase, state, step)

    def _go_back(self, jumped: str, phase: Phase, state: State, step: int) -> int:
        """Fill the state with a checkpoint from before the loss jumped; its step. The one it is at: there is none.

        It is saved again at once, with what a restart has to know: that it was gone back to, and what is left out.
        """
        settings, watch = self.run.mpl.guard.rewind, self._watch
        assert settings is not None
        assert watch is not None
        if self._rewinds >= settings.max_rewinds:
            used = f"mpl_scale.guard.rewind.max_rewinds = {settings.max_rewinds} used up,"
            self._refuse([f"{jumped}, with {used}"], phase, state, step, otherwise="set mpl_scale.guard.rewind = null")
        self._tell("save", phase, step)
        snapshot = self.snapshots.go_back(phase, step=watch.last_good)
        if snapshot is None:
            watch.start_anew(step)
            self.writers.note(
                f"{jumped}, after step {step} of {phase.name}; there is no earlier checkpoint of it, so training "
                "continues"
            )
            return step
        self.snapshots.restore(snapshot, state)
        again = step - snapshot.step
        self._rewinds += 1
        self._data_offset += again if settings.skip_batches else 0
        self.global_step -= again
        self.writers.go_back(global_step=self.global_step)
        watch.start_anew(snapshot.step)
        images = "the images that follow" if settings.skip_batches else "the same images"
        self.writers.note(
            f"{jumped}, after step {step} of {phase.name}; back to {snapshot.folder}, step {snapshot.step}, and on "
            f"with {images} (rewind {self._rewinds} of {settings.max_rewinds})"
        )
        self.snapshots.save(
            phase,
            state,
            step=snapshot.step,
            global_step=self.global_step,
            metadata=self._metadata(),
            needed=False,
        )
        self._tell("train", phase, snapshot.step)
        return snapshot.step

    def _batch_ids(self, phase: Phase, step: int) -> str:
        return batch_ids(phase, config=self.run.mpl, splits=self.splits, step=step + self._data_offset)

    def _refuse(
        self,
        found: Sequence[str],
        phase: Phase,
        state: State,
        step: int,
        *,
        otherwise: str = "continue with mpl_scale.guard.nonfinite = off",
    ) -> NoReturn:
        """End the run over non-finite values, its state set aside; the same on every rank."""
        self._tell("save", phase, step)
        try:
            saved = f"the state is in {self.snapshots.set_aside(phase, state, step=step, global_step=self.global_step)}"
        except CheckpointError as error:
            saved = f"the state could not be saved ({error})"
        ids = self._batch_ids(phase, step)
        raise ValueError(
            f"{', '.join(found)} after step {step} of {phase.name}, whose batch was {ids}; {saved}, it will not be "
            f"used for resuming; lower the learning rate, look at these images, or {otherwise}"
        )

    def _evaluate(self, phase: Phase, state: State, step: int) -> None:
        """Measure every network of the state; the finetuned student is a result of its own."""
        found = self._evaluator.evaluate(collect_weights(state, mesh=self.mesh))
        if phase.name == "finetune":
            found = {"finetuned": found["student"]}
        self.results |= found
        values = {f"{name}_{key}": value for name, result in found.items() for key, value in result.items()}
        self.writers.write(values, phase=phase.name, step=step, global_step=self.global_step)

    def _averages(self, metrics: StepMetrics) -> dict[str, float]:
        """The step's metrics, averaged over ranks: the one place where device values are read."""
        stacked = torch.stack([value.detach().double() for value in metrics.values()])
        if self.mesh.world_group is not None:
            dist.all_reduce(stacked, group=self.mesh.world_group)
        return dict(zip(metrics, (stacked / self.mesh.world).tolist(), strict=True))

    def _agreed_request(self, step: int) -> Request:
        """The most that any rank is asked for. On GPUs only now and then, because their answer waits for the device."""
        stop = self.stop_requested()  # at every step: it learns from this that there is something to save
        together = self.mesh.world_group is not None
        if together and self.mesh.device.type == "cuda" and step % self.run.mpl.logging.every:
            return Request.NONE
        own = Request.STOP if stop else self.control() if self.control is not None else Request.NONE
        if not together:
            return own
        asked = torch.tensor(float(own), device=self.mesh.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.mesh.world_group)
        return Request(int(asked.item()))
