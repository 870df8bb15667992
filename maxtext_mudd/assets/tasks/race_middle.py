"""Groups the rows of RACE-M by article, as the harness's task `race` expects them.

That task asks the last question of an article, and shows the others with their answers.
"""

import datasets


def by_article(rows: datasets.Dataset) -> datasets.Dataset:
  """Returns one document per article, in the order of the rows.

  Args:
    rows: one row per question, with the columns article, question, options and answer.

  Returns:
    The column `article`, and the column `problems`: the questions, as Python prints a list of dicts.
  """
  problems_by_article = {}
  for row in rows:
    problem = {key: row[key] for key in ("question", "answer", "options")}
    problems_by_article.setdefault(row["article"], []).append(problem)
  problems = [str(problems) for problems in problems_by_article.values()]
  return datasets.Dataset.from_dict({"article": list(problems_by_article), "problems": problems})
