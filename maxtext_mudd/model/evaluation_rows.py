"""Makes every evaluation of MaxText's trainers for fine-tuning read the same rows."""

from collections.abc import Callable, Iterator


def from_the_first(stock):
  """Makes a `make_hf_eval_iterator` whose evaluations all start at the first row.

  Tunix calls `iter` before each evaluation, and MaxText 0.2.5 then calls `iter` of its `grain.DataLoader`. Behind that
  is one stream of `datasets` (`HFDataSource`), which goes on where it stopped: each evaluation would read other rows,
  and none once they have ended.

  Args:
    stock: MaxText's function.
  """

  def make_hf_eval_iterator(config, global_mesh, process_indices_eval):
    iterator = stock(config, global_mesh, process_indices_eval)
    iterator.dataloader = _Reopened(lambda: stock(config, global_mesh, process_indices_eval))
    return iterator

  return make_hf_eval_iterator


class _Reopened:
  """Data that are opened again by each `iter`."""

  def __init__(self, reopen: Callable):
    """
    Args:
      reopen: makes a `MultiHostDataLoadIterator`.
    """
    self._reopen = reopen

  def __iter__(self) -> Iterator:
    self._open = self._reopen()  # kept, since MaxText closes the data of an iterator that nothing refers to
    return self._open.local_iterator
