"""The rows of RACE as the harness's `race` reads them: the last question of an article is asked, the others are shown
with their answers."""

import datasets


def by_article(rows: datasets.Dataset) -> datasets.Dataset:
  """One document per article, in the order of the rows.

  Args:
    rows: one per question: article, question, options, answer.

  Returns:
    `article`, and `problems`, the questions as Python writes a list of dicts.
  """
  articles = {}
  for row in rows:
    problem = {key: row[key] for key in ("question", "answer", "options")}
    articles.setdefault(row["article"], []).append(problem)
  return datasets.Dataset.from_dict({"article": list(articles), "problems": list(map(str, articles.values()))})
