# One image for every stage. CPU torch by default; for GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS needed
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Set to 1, pip takes wheels from docker/wheels alone.
ARG PIP_NO_INDEX
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS=/wheels PATH=/opt/thinpipe/bin:$PATH
RUN python3 -m venv /opt/thinpipe
COPY docker/wheels /wheels
WORKDIR /src
# What thinpipe needs, in a layer of its own: a change of the source does not build it again.
COPY constraints.txt pyproject.toml ./
RUN pip install --index-url ${TORCH_INDEX} -r constraints.txt \
 && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /tmp/needed \
 && pip install -c constraints.txt -r /tmp/needed 'setuptools>=77' \
 && rm -rf /opt/thinpipe/lib/python3*/site-packages/torch/include /opt/thinpipe/lib/python3*/site-packages/torch/test \
 && find /opt/thinpipe -type d \( -name tests -o -name test \) -path '*/site-packages/*' \
      \( -path '*/pandas/*' -o -path '*/pyarrow/*' -o -path '*/scipy/*' -o -path '*/sympy/*' -o -path '*/matplotlib/*' \) \
      -prune -exec rm -rf {} +

FROM needed AS build
COPY README.md LICENSE __init__.py cli.py ./
COPY commands commands
COPY node node
COPY protocol protocol
COPY compress compress
COPY sim sim
RUN pip wheel --no-deps --no-build-isolation -w /built . && pip install --no-deps /built/*.whl
# The default data, the standard library's source, is tokenised once, here: stages find it in a new volume.
RUN cd / && THINPIPE_CACHE=/runs/cache python -c "from thinpipe.node.config_file import parse_config; \
      from thinpipe.node.node_process import prepare_corpus; prepare_corpus(parse_config({}))"

FROM ${BASE}
RUN command -v tc > /dev/null \
 || (apt-get update && apt-get install -y --no-install-recommends iproute2 && rm -rf /var/lib/apt/lists/*)
RUN useradd --system --uid 10001 --create-home thinpipe
ENV PATH=/opt/thinpipe/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=needed /opt/thinpipe /opt/thinpipe
COPY --from=build --chown=thinpipe:thinpipe /runs /runs
COPY --from=build /built /built
RUN pip install --no-deps --no-index --no-cache-dir /built/*.whl
USER thinpipe
WORKDIR /runs
ENTRYPOINT ["thinpipe"]
CMD ["--help"]
