# The image that `make submit` runs: Python 3.12, the pinned requirements with libtpu, this package, and the files that a
# command line names. docs/cluster.md says how to build it.
FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY yaml yaml
COPY maxtext_mudd maxtext_mudd
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
WORKDIR /app
# first, since they change least and weigh most; they are complete, so nothing is to be resolved
COPY requirements/tpu.txt requirements/
RUN pip install --no-cache-dir --no-deps -r requirements/tpu.txt && pip check
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl
COPY MaxText MaxText
COPY yaml yaml
