"""A run from the command line to its end: prepare, train, then plots, the model and a sample."""

import shlex
import sys
from pathlib import Path

from jax_moe.disk import write_whole
from jax_moe.process import INTERRUPTED, any_encoding
from jax_moe.programs import keep_programs
from moe_train import INSTALLED
from moe_train.configs.launch import Launch
from moe_train.options import read_launch, read_settings
from moe_train.plots import plot_run
from moe_train.prepare import Run, prepare, removed
from moe_train.run import folder as run_folder
from moe_train.run.interrupt import Interrupt
from moe_train.run.logger import NoLogger, open_logger
from moe_train.run.progress import Silent, display
from moe_train.run.together import AgreedError, InterruptOfAny, Processes, leave_at_once, meet
from moe_train.steps import DivergedError, Steps

COMPILING = "compiling: seconds for a small model, minutes for a large one"


def main() -> int:
    """The command; its exit code. A wrong request and an early end are reported in one line on stderr."""
    any_encoding()
    try:
        launch = read_launch(sys.argv[1:])
        processes = meet(launch)
        if launch.compilation_cache:
            keep_programs()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_alone() if processes.count == 1 else run_with(processes, launch)


def run_with(processes: Processes, launch: Launch) -> int:
    """The command in one of several processes. What fails in any of them ends all, and process 0 says why."""
    run = None
    try:
        processes.agree({"processes": launch.processes})
        settings = processes.everywhere(lambda: read_settings(sys.argv[1:]))
        run = prepare(*settings, processes=processes)
        return train(run)
    except (AgreedError, DivergedError) as error:
        if processes.first:
            print(f"error: {error}{_saved(run)}", file=sys.stderr)
        return error.status if isinstance(error, AgreedError) else 1
    except BaseException as error:  # the others would wait for this process, and its lock ends with it
        leave_at_once(error, _saved(run))
    finally:
        if run:
            run.lock.release()


def run_alone() -> int:
    """The command in one process."""
    run = None
    try:
        try:
            run = prepare(*read_settings(sys.argv[1:]))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return train(run)
    except (DivergedError, OSError) as error:
        print(f"error: {_reason(error, run)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped at once, nothing more was saved{_saved(run)}", file=sys.stderr)
        return INTERRUPTED
    finally:
        if run:
            run.lock.release()


def train(run: Run) -> int:
    """Trains until the last step or a signal; the exit code."""
    config, processes = run.config, run.processes
    logger = processes.alone(lambda: open_logger(run.folder, run.config)) or NoLogger()
    interrupt = Interrupt() if processes.count == 1 else InterruptOfAny(processes)
    with interrupt as stop, display(run.start, config.steps) if processes.first else Silent() as show:
        learner, text = run.learner, run.text
        show.line(f"{run.folder}: {learner.num_parameters:,} parameters, {learner.device}, {text.source}, {text.size}")
        memory = learner.memory()
        if memory is not None:
            more = f"and {memory.gradients:,} of gradients in a step"
            show.line(f"memory of a device: {memory.state:,} bytes of weights and optimizer state {more}")
        if run.note:
            show.line(run.note)
        if learner.compiles and run.start < config.steps:
            show.line(COMPILING)
        try:
            done = Steps(run, logger, stop, show).to_end()
        finally:
            run.close()
        memory = learner.memory()
        if memory is not None:
            show.line(f"memory of a device, measured: {memory.held:,} bytes of weights and optimizer state")
    processes.alone(lambda: logger.close(finished=done == config.steps))
    if done == config.steps:
        finish(run)
        return 0
    if config.pretrained is not None:
        run.learner.write(run.folder)
    go_on = resume_command(run.folder, config.export)
    go_on += "" if processes.count == 1 else " with the options that start each process"
    print(f"stopped and saved at step {done} of {config.steps}; to go on: {go_on}", flush=True)
    return INTERRUPTED


def finish(run: Run) -> None:
    """Writes plots, the trained model, its export and a sample; prints the sample."""
    config, folder, processes = run.config, run.folder, run.processes
    processes.alone(lambda: plot_run(folder, run.rows))
    run.learner.write(folder)
    target = config.export
    if target is not None:
        from moe_train.run.export import export

        processes.alone(lambda: export(folder, Path(target)))
    tokens = run.learner.sample(run.text.encode(config.sample_prompt), config.sample_length, config.sample_temperature)
    sample = run.text.decode(tokens)
    processes.alone(lambda: write_whole(folder / "sample.txt", sample + "\n"))
    run.check_there()
    print(f"\n{sample}\n\nwrote {folder}" + (f" and {target}" if target else ""), flush=True)


def resume_command(folder: Path, export: str | None = None) -> str:
    """What the user types to continue."""
    command = INSTALLED if sys.argv[0] == INSTALLED else f"python {shlex.quote(sys.argv[0])}"
    again = "" if export is None else f" --export {shlex.quote(export)}"
    return f"{command} --resume --out {shlex.quote(str(folder))}{again}"


def _saved(run: Run | None) -> str:
    """The end of a message: which checkpoint is safe."""
    return f"; {run_folder.what_is_saved(run.folder)}" if run else ""


def _reason(error: Exception, run: Run | None) -> str:
    """In one line: what failed, and which checkpoint is safe."""
    reason = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or (run.folder if run else "the output")
        reason = f"{where}: cannot be written ({error.strerror})"
    if run is None:
        return reason
    if run.lock.lost():
        return removed(run.folder)
    return f"{reason}{_saved(run)}"
