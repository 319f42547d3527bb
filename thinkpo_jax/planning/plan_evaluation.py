"""Compiles the decode step of a run's evaluation, and prints how many answers fit and how fast they may be."""

from thinkpo_jax.models.model_folder import resolve_architecture
from thinkpo_jax.planning.estimates import ACHIEVABLE_BANDWIDTH, ACHIEVABLE_NETWORK, ACHIEVABLE_PEAK, parameter_count
from thinkpo_jax.planning.hlo import COLLECTIVE_KINDS
from thinkpo_jax.planning.inference import PROMPT_TOKENS, DecodePlan, plan_decode_step
from thinkpo_jax.planning.topology import Topology
from thinkpo_jax.run.run_config import RunConfig
from thinkpo_jax.runtime.config import RunError, UserError
from thinkpo_jax.runtime.devices import GIB


def plan_evaluation(config: RunConfig, topology: Topology) -> None:
    """Compiles the decode step and prints what each device needs. Raises `RunError` if it does not fit."""
    if config.evaluation is None:
        raise UserError("the configuration has no `evaluation`, so there is nothing to plan. Add it (see README).")
    if config.evaluation.engine != "local":
        raise UserError(
            f"evaluation.engine is {config.evaluation.engine!r}, which uses no device of this run. "
            "Only an evaluation with the local engine can be planned: set evaluation.engine=local."
        )
    arch, compute = resolve_architecture(config.model), config.compute
    print(
        f"evaluation of {config.model.path}, {parameter_count(arch) / 1e9:.3g} billion parameters in {compute.dtype}, "
        f"on {topology.name}: {topology.size} device(s)",
        flush=True,
    )
    plan = plan_decode_step(config, topology)
    print("\n".join(f"{label:<36}{value:>18}".rstrip() for label, value in _rows(plan, topology)))
    print(f"compiled in {plan.compile_seconds:.0f} s\n")
    print(_assumptions(plan, topology), flush=True)
    problem = _find_problem(plan, topology)
    if problem is not None:
        raise RunError(f"the evaluation does not fit: {problem}")
    print(f"the evaluation fits: {topology.describe_share(plan.total_bytes)}")


def _find_problem(plan: DecodePlan, topology: Topology) -> str | None:
    """Describes why the evaluation does not fit. Returns None if it fits."""
    if plan.loading_bytes > topology.memory:
        return f"loading the weights takes {topology.describe_share(plan.loading_bytes)}. Take larger devices."
    if plan.total_bytes > topology.memory:
        share = topology.describe_share(plan.total_bytes)
        return f"a decode step takes {share}. Set evaluation.local.cache_memory lower."
    if not plan.longest_answers:
        return (
            f"the cache of a group holds {plan.group_tokens} tokens, but an answer may need {plan.longest}. Lower "
            "evaluation.sampling.max_new_tokens, or take larger devices."
        )
    return None


def _rows(plan: DecodePlan, topology: Topology) -> list[tuple[str, str]]:
    """Returns the labels and values of the table."""
    rows = [
        ("groups x devices of a group", f"{plan.groups} x {plan.tensor}"),
        ("decode kernel", plan.kernel),
        ("weights", f"{plan.weight_bytes / GIB:.2f} GiB"),
        ("KV cache", f"{plan.cache_bytes / GIB:.2f} GiB"),
        ("temporary", f"{plan.temporary_bytes / GIB:.2f} GiB"),
        ("total per device", f"{plan.total_bytes / GIB:.2f} GiB"),
        (f"of {topology.memory / GIB:.2f} GiB", f"{plan.total_bytes / topology.memory:.0%}"),
        ("while loading", f"{plan.loading_bytes / GIB:.2f} GiB"),
        ("tokens in the cache of a group", f"{plan.group_tokens}"),
        ("tokens in the cache of all groups", f"{plan.groups * plan.group_tokens}"),
        (f"answers of {plan.longest} tokens that fit", f"{plan.groups * plan.longest_answers}"),
        ("slots", f"{plan.groups * plan.slots}"),
    ]
    for kind in COLLECTIVE_KINDS:
        chosen = [each for each in plan.collectives if each.kind == kind]
        if chosen:
            received = sum(each.bytes_received * each.num_executions for each in chosen)
            count = sum(each.num_executions for each in chosen)
            rows.append((f"{kind} per step, received", f"{count} x, {received / 1e6:.3g} MB"))
    rows.append(("estimates, not validated on hardware:", ""))
    rows += [
        (f"  {bound} time of a step", f"{1e3 * seconds:.3g} ms") for bound, seconds in plan.bounds._asdict().items()
    ]
    answers, seconds = plan.groups * plan.running_answers, max(plan.bounds)
    rows.append((f"  answers at once, {plan.mean_tokens} tokens each", f"{answers}"))
    rows.append(("  tokens/s per device, at most", f"{answers / seconds / topology.size:.4g}"))
    return rows


def _assumptions(plan: DecodePlan, topology: Topology) -> str:
    """Describes what the figures assume."""
    device = topology.device
    lines = [
        f"A prompt has {PROMPT_TOKENS} tokens. Its answer may get evaluation.sampling.max_new_tokens tokens, as far as "
        f"the context of the model and the cache allow: {plan.longest} tokens together.",
        "A step gives each slot one token. Memory and collectives are those of the optimized program.",
        f"Times assume {ACHIEVABLE_PEAK:.0%} of {device.peak / 1e12:.4g} TFLOP/s, {ACHIEVABLE_BANDWIDTH:.0%} of "
        f"{device.bandwidth / 1e12:.3g} TB/s of memory and {ACHIEVABLE_NETWORK:.0%} of "
        f"{device.interconnect_bandwidth / 1e9:.4g} GB/s between devices. The slowest of the three hides the others. "
        "They are lower bounds, without prefill, sampling and the latency of collectives.",
    ]
    if device.gpu is not None:
        lines.append(topology.describe_memory_fraction())
    return "Assumptions:\n" + "\n".join(f"- {line}" for line in lines)
