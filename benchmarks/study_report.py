"""Writes the report of a study: mean losses, paired differences with their intervals, and a picture.

`.venv/bin/python benchmarks/study.py yaml/study/table_5.yml --report` calls it.
"""

import collections
import dataclasses
import itertools
import math
import pathlib
import statistics

import record
import scipy.stats

from maxtext_mudd.config.errors import ConfigError

# A run has diverged if its final loss is above this many times the median of the model that it is compared with. Runs
# that train end within 7 % of it in the studies so far.
FAR = 1.1
BYTES_PER_TOKEN = 4  # of the paper's tokenizer on the Pile, about
BITS = "bits per byte"
COLUMNS = [
  "difference",
  "95% interval",
  "deviation",
  "paper",
  "tokens/s",
  "largest gradient norm",
  "dead",
]
NOTES = """
Held-out loss: loss in {unit} after the last step, as the mean over seeds with its standard error. Difference: loss
minus that of `{baseline}`, or of the model in brackets, with the same seed; runs of one seed read the same rows and
start from the same values. The table has the mean of the differences, the 95% interval of the mean by Student's t, and
the standard deviation of single differences. Not paired: no two runs of one seed have the same hash of the corpus (a
missing hash counts as one); the table has the difference of the means, and its 95% interval by Welch's t.{paper}
Tokens/s: that of the median step of each run, as the median over runs; the machines above may differ in speed.
Parameters: as stored, which includes the padding of scanned layers. Largest gradient norm: before clipping, of all
steps from the first on. Dead: runs that diverged: their loss was not finite, or ended above {far} times the median of
the model that they are compared with at this rate. No mean includes them, and a model with dead runs has no difference.

Rankings of models this small need not be those of large ones.
"""
OF_PAPER = """ Paper:
the difference of the logarithms of Table 5's perplexities, at 405M parameters on the Pile; in bits per byte if a token
is {bytes} bytes."""


@dataclasses.dataclass(frozen=True)
class Difference:
  """Difference of the losses of two models, in the unit of the study.

  Attributes:
    mean: mean over seeds.
    deviation: standard deviation of the differences of single seeds; NaN for one seed, or if they are not paired.
    half_width: half the width of the 95% interval of the mean; infinite for one seed.
    paired: whether losses of the same seed were subtracted.
  """

  mean: float
  deviation: float
  half_width: float
  paired: bool = True

  @classmethod
  def of(cls, values: list[float]) -> "Difference":
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
      return cls(mean, math.nan, math.inf)
    deviation = statistics.stdev(values)
    return cls(mean, deviation, float(scipy.stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n))

  @classmethod
  def of_means(cls, first: list[float], second: list[float]) -> "Difference":
    """The mean of `first` minus that of `second`, whose losses cannot be paired."""
    mean = statistics.fmean(first) - statistics.fmean(second)
    if min(len(first), len(second)) < 2:
      return cls(mean, math.nan, math.inf, paired=False)
    interval = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return cls(mean, math.nan, float(interval.high - interval.low) / 2, paired=False)

  @property
  def resolved(self) -> bool:
    """Whether the interval excludes zero."""
    return abs(self.mean) > self.half_width


@dataclasses.dataclass(frozen=True)
class Summary:
  """The results of one model at one learning rate.

  Attributes:
    model: name of the model.
    learning_rate: the learning rate.
    rows: results of its runs.
    losses: final held-out loss of each run that is not dead, by seed.
    dead: seeds of the dead runs.
    against: name of the model that it is compared with; empty for none, as of the baseline.
    pairs: seeds of the runs that are compared one by one with those of that model, on the same corpus.
    difference: difference to that model; None if one of the two has dead runs or no runs.
  """

  model: str
  learning_rate: float
  rows: list[dict]
  losses: dict[int, float]
  dead: list[int]
  against: str
  pairs: list[int]
  difference: Difference | None


def final(row: dict) -> float | None:
  """Held-out loss after the last step; None if it is not finite."""
  return list(row["held_out"].values())[-1] if row["held_out"] and not row["dead"] else None


def summarise(study, cells, results) -> list[Summary]:
  """One summary for each learning rate and model that has results, in the order of the study."""
  rows = collections.defaultdict(list)
  for cell in cells:
    if row := results.of(cell):
      rows[cell.learning_rate, cell.model].append(row)
  losses, dead = {}, {}
  for (rate, name), model_rows in rows.items():
    by_seed = {row["seed"]: final(row) for row in model_rows}
    of_plain = [x for row in rows.get((rate, against_of(study, name) or name), []) if (x := final(row)) is not None]
    limit = FAR * statistics.median(of_plain) if of_plain else math.inf
    losses[rate, name] = {seed: x for seed, x in by_seed.items() if x is not None and x <= limit}
    dead[rate, name] = [seed for seed in by_seed if seed not in losses[rate, name]]
  summaries = []
  for rate in study.learning_rates:
    for name in study.models:
      if (key := (rate, name)) in rows:
        against = against_of(study, name)
        pairs, difference = compared(rate, name, against, rows, losses)
        summaries.append(Summary(name, rate, rows[key], losses[key], dead[key], against, pairs, difference))
  return summaries


def against_of(study, name: str) -> str:
  """The model that a model is compared with; empty for none, as of the baseline."""
  against = study.models[name].against or study.baseline
  return "" if name in (against, study.baseline) else against


def compared(rate: float, name: str, against: str, rows, losses) -> tuple[list[int], Difference | None]:
  """The seeds that are compared one by one, and the difference of two models at one learning rate.

  Args:
    rows, losses: results, and losses by seed of runs that did not diverge, by learning rate and model.
  """
  of_model, other = losses.get((rate, name), {}), losses.get((rate, against), {})
  corpora = [{row["seed"]: row.get("corpus") for row in rows.get((rate, x), [])} for x in (name, against)]
  pairs = sorted(seed for seed, _ in corpora[0].items() & corpora[1].items() if seed in of_model and seed in other)
  if any(len(corpora[k]) > len(x) for k, x in enumerate((of_model, other))) or not (of_model and other):
    return pairs, None
  if pairs:
    return pairs, Difference.of([of_model[seed] - other[seed] for seed in pairs])
  return pairs, Difference.of_means([*of_model.values()], [*other.values()])


def _mean(values: list[float]) -> str:
  if not values:
    return "n/a"
  error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
  return f"{statistics.fmean(values):.4f}{error}"


def _row(study, summary: Summary) -> list[str]:
  rows, difference, model = summary.rows, summary.difference, study.models[summary.model]
  paper = ""
  if summary.against and model.paper and study.models[summary.against].paper:
    nats = math.log(model.paper / study.models[summary.against].paper)
    paper = f"{nats / (BYTES_PER_TOKEN * math.log(2)) if study.unit == BITS else nats:+.4f}"
  named = f" [{summary.against}]" if summary.against not in ("", study.baseline) else ""
  named += "" if not difference or difference.paired else ", not paired"
  norms = [row["largest_gradient_norm"] for row in rows]
  return [
    summary.model,
    f"{summary.learning_rate:g}",
    f"{rows[0]['parameters']:,}",
    str(len(rows)) if not summary.dead else f"{len(summary.losses)} of {len(rows)}",
    _mean(list(summary.losses.values())),
    f"{difference.mean:+.4f}{named}" if difference else "",
    f"± {difference.half_width:.4f}" if difference and math.isfinite(difference.half_width) else "",
    f"{difference.deviation:.4f}" if difference and math.isfinite(difference.deviation) else "",
    paper,
    f"{statistics.median(row['tokens_per_second'] for row in rows):,.0f}",
    "not finite" if None in norms else f"{max(norms):.2f}",
    str(len(summary.dead)) if summary.dead else "",
  ]


def sentences(summaries: list[Summary], missing: int) -> list[str]:
  """Sentences below the table: missing runs, differences that may be noise, and the size of the noise."""
  lines = []
  if missing:
    lines.append(f"**Not complete**: {missing} of the study's runs have no result yet.")
  compared = [x for x in summaries if x.difference]
  unresolved = [f"`{x.model}` at {x.learning_rate:g}" for x in compared if not x.difference.resolved]
  if unresolved:
    lines.append(
      "The sign of the difference is uncertain (its 95% interval includes zero, or there is only one seed) for "
      f"{', '.join(unresolved)}."
    )
  deviations = [x.difference.deviation for x in compared if math.isfinite(x.difference.deviation)]
  means = sorted(x.difference.mean for x in compared if x.difference.paired)
  if (
    deviations and len(means) > 1 and len({(x.learning_rate, x.against) for x in compared if x.difference.paired}) == 1
  ):
    step = statistics.median(b - a for a, b in itertools.pairwise(means))
    lines.append(
      f"The standard deviation of the paired differences is {statistics.median(deviations):.4f} (median over models); "
      f"two models that follow each other in the order of mean differences are {step:.4f} apart (median)."
    )
  return lines


def _outcomes(study, summaries: list[Summary]) -> str:
  """For a study with several groups of models, a table of what became of their runs, by learning rate."""
  if len(groups(study)) == 1:
    return ""
  found = {(x.model, x.learning_rate): x for x in summaries}

  def outcome(summary: Summary | None) -> str:
    if summary is None:
      return ""
    alive, difference = f"{len(summary.losses)} of {len(summary.rows)}", summary.difference
    if not summary.losses:
      return alive
    return f"{alive}, {difference.mean:+.3f}" if difference else f"{alive}, {_mean([*summary.losses.values()])[:5]}"

  rates = study.learning_rates
  rows = [[name, *(outcome(found.get((name, x))) for x in rates)] for names in groups(study).values() for name in names]
  return (
    "\nHow many runs did not diverge, and the mean difference if none did (for a plain model, and where some did, the "
    f"mean loss of the others):\n\n{record.table(['model', *(f'rate {x:g}' for x in rates)], rows)}"
  )


def _costs(study, summaries: list[Summary], results) -> str:
  """For a study with references, the table of costs."""
  if not study.references:
    return ""
  import study_costs

  timings = {row["model"]: row for row in results.rows() if row["kind"] == "timing"}
  return f"\n{study_costs.table(study, summaries, timings)}"


def _further(study, cells, results) -> list[str]:
  """A sentence for each of the study's further comparisons."""
  lines = []
  rows = collections.defaultdict(list)
  for cell in cells:
    if row := results.of(cell):
      rows[cell.learning_rate, cell.model].append(row)
  losses = {(x.learning_rate, x.model): x.losses for x in summarise(study, cells, results)}
  for name, against in study.compare:
    for rate in study.learning_rates:
      _, difference = compared(rate, name, against, rows, losses)
      if difference and math.isfinite(difference.half_width):
        how = "" if difference.paired else ", not paired"
        lines.append(f"`{name}` less `{against}`: {difference.mean:+.4f} ± {difference.half_width:.4f}{how}")
  return [f"Further differences, with 95% intervals: {'; '.join(lines)}."] if lines else []


def groups(study) -> dict[str, list[str]]:
  """Models by the one that they are compared with, which comes first; only those with a group of their own."""
  found = {}
  for name in study.models:
    against = against_of(study, name)
    is_plain_of_others = any(model.against == name for model in study.models.values())
    found.setdefault(name if not against or is_plain_of_others else against, []).append(name)
  return found


def draw(study, summaries: list[Summary], path: pathlib.Path) -> None:
  """Draws training loss over steps, the mean over seeds with a band from the lowest to the highest. Each learning rate
  has a row. A study whose models are compared with one model has a second column, the paired difference to it; other
  studies have a column for each group of models. The axes are chosen without the dead runs, which may lie outside."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  rates = [rate for rate in study.learning_rates if any(x.learning_rate == rate for x in summaries)]
  columns = groups(study)
  size = (15, 6) if len(columns) == 1 else (5.5 * len(columns), 4.5)
  figure, rows = pyplot.subplots(
    len(rates), max(2, len(columns)), figsize=(size[0], size[1] * len(rates)), layout="constrained", squeeze=False
  )
  for rate, axes in zip(rates, rows):
    for panel, (plain, names) in zip(axes, columns.items()):
      of_group = {x.model: x for x in summaries if x.learning_rate == rate and x.model in names}
      colors = dict(zip(names, itertools.cycle(pyplot.get_cmap("tab20" if len(names) > 10 else "tab10").colors)))
      _draw_losses(panel, of_group, colors)
      title = f"learning rate {rate:g}" + (f", {plain}" if len(columns) > 1 else "")
      panel.set(xlabel="step", ylabel=f"training loss, {study.unit}", title=title)
      if of_group:  # a study that is not complete may have none yet
        panel.legend(fontsize=8, loc="upper right")
    if len(columns) == 1:
      _draw_differences(axes[1], of_group, colors)
      axes[1].set(xlabel="step", ylabel=f"difference to the plain model (same seed), {study.unit}")
    for panel in axes:
      panel.grid(alpha=0.3)
  figure.savefig(path, dpi=110 if len(columns) == 1 else 80)
  pyplot.close(figure)


def _draw_losses(axes, summaries: dict[str, Summary], colors) -> None:
  losses = []
  for name, summary in summaries.items():
    curves = _curves(summary)
    _band(axes, list(curves.values()), color=colors[name], label=name)
    losses += [x for seed in summary.losses for x in curves[seed].values()]
  if losses:
    axes.set_ylim(0.97 * min(losses), sorted(losses)[int(0.9 * (len(losses) - 1))])


def _draw_differences(axes, summaries: dict[str, Summary], colors) -> None:
  differences = []
  for name, summary in summaries.items():
    lines, curves = [], _curves(summary)
    for seed in summary.pairs if summary.against in summaries else ():
      other = _curves(summaries[summary.against])[seed]
      lines.append({step: loss - other[step] for step, loss in curves[seed].items() if step in other})
    _band(axes, lines, color=colors[name], label=name)
    differences += [x for line in lines for x in line.values()]
  if differences:
    largest = sorted(map(abs, differences))[int(0.98 * (len(differences) - 1))]
    axes.set_ylim(-1.1 * largest, 1.1 * largest)
  axes.axhline(0, color="black", linewidth=0.8)


def _curves(summary: Summary) -> dict[int, dict[int, float]]:
  """Training loss of each run by step, by seed. The last point of a run is left out if it is of fewer steps than the
  others, whose mean varies less."""
  curves = {}
  for row in summary.rows:
    steps = sorted(map(int, row["train"]))
    if len(steps) > 2 and steps[-1] - steps[-2] < steps[1] - steps[0]:
      steps.pop()
    curves[row["seed"]] = {step: x for step in steps if (x := row["train"][str(step)]) is not None}
  return curves


def _band(axes, curves: list[dict[int, float]], **style) -> None:
  """Draws the mean of several curves and the band between their extremes, at the steps that all have."""
  steps = sorted(set.intersection(*map(set, curves))) if curves else []
  if not steps:
    return
  by_step = [[curve[step] for curve in curves] for step in steps]
  axes.plot(steps, [statistics.fmean(x) for x in by_step], linewidth=1.3, **style)
  axes.fill_between(steps, [min(x) for x in by_step], [max(x) for x in by_step], alpha=0.15, color=style["color"])


def write(study, cells, results, file: pathlib.Path) -> str:
  """Writes NAME.md and NAME.png beside the results; returns the text of NAME.md.

  Raises:
    ConfigError: there are no results.
  """
  summaries = summarise(study, cells, results)
  if not summaries:
    raise ConfigError(f"{results.path} has no results of this study; run its cells first.")
  missing = sum(results.of(cell) is None for cell in cells) + sum(
    len(study.seeds) * len(study.learning_rates)
    for model in study.models.values()
    if model.same_time_as and model.same_time_as not in results.ratios()
  )
  picture = results.path.with_suffix(".png")
  draw(study, summaries, picture)
  used = [row for summary in summaries for row in summary.rows]
  machines = sorted({f"{row['cpu']}, {row['cores']} core(s)" if row["cores"] else row["cpu"] for row in used})
  commits = sorted({row["commit"] for row in used})
  timings = [
    f"- step time of `{row['model']}` over `{row['against']}`: {row['ratio']['median']:.3f}, quartiles "
    f"{row['ratio']['lower_quartile']:.3f} to {row['ratio']['upper_quartile']:.3f}, in turn in one process\n"
    for row in results.rows()
    if row["kind"] == "timing"
  ]
  lengths = sorted({model.tokens or study.tokens for model in study.models.values()})
  length = ", ".join(f"about {tokens:,}" if tokens else "as configured" for tokens in lengths)
  text = (
    f"# {results.path.stem}\n\n- command: `python benchmarks/study.py {file.as_posix()}`, then `--report`\n"
    f"- tokens of a run: {length}; seeds: {', '.join(map(str, study.seeds))}\n"
    f"- machines: {'; '.join(machines)}\n- commits: {', '.join(commits)}\n{''.join(timings)}\n"
    + record.table(
      ["model", "rate", "parameters", "runs", f"held-out {study.unit}", *COLUMNS],
      [_row(study, summary) for summary in summaries],
    )
    + _outcomes(study, summaries)
    + _costs(study, summaries, results)
    + "".join(f"\n{line}\n" for line in [*sentences(summaries, missing), *_further(study, cells, results)])
    + NOTES.format(
      baseline=study.baseline,
      far=FAR,
      unit=study.unit,
      paper=OF_PAPER.format(bytes=BYTES_PER_TOKEN) if any(x.paper for x in study.models.values()) else "",
    )
    + f"\n![Curves]({picture.name})\n"
  )
  results.path.with_suffix(".md").write_text(text)
  return text
