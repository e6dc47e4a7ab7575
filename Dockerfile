# docker build --tag requant .
# docker run --rm --volume "$PWD:/work" --workdir /work --user "$(id --user)" --env HOME=/work requant run recipe.yaml
# PyPI's torch carries CUDA, which is several GB: for a machine without a GPU add the index of PyTorch's CPU builds with
#   --build-arg PIP_EXTRA_INDEX_URL=…

FROM python:3.11-slim AS build
# PyPcre, which gptqmodel needs, is C and not built for every platform; gptqmodel itself comes as source.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential libpcre2-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/requant
ENV PATH=/opt/requant/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /build
COPY constraints.txt ./
# The large ones in a layer of their own, which a change of the code leaves alone.
RUN pip install --constraint constraints.txt torch numpy setuptools
COPY pyproject.toml README.md ./
COPY pipeline pipeline
COPY flows flows
RUN pip install --constraint constraints.txt ".[all]"

FROM python:3.11-slim
COPY --from=build /opt/requant /opt/requant
WORKDIR /app
# What `prefect deploy` reads: the deployment, the flow's file that it names, the demo recipe's files.
COPY prefect.yaml ./
COPY flows flows
COPY examples examples
RUN useradd --create-home --uid 10001 requant && install --directory --owner requant /app/artifacts
ENV PATH=/opt/requant/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    HF_HUB_DISABLE_TELEMETRY=1
USER requant
VOLUME /app/artifacts
ENTRYPOINT ["requant"]
CMD ["--help"]
