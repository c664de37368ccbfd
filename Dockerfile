# Image of Gammaslim: the smallest CUDA base, torch's wheels (which contain the CUDA libraries), the job.
#
#   docker build -t gammaslim .                                     (or podman, buildah; Docker needs BuildKit)
#   mkdir -p runs
#   docker run --rm --gpus all -v "$PWD/runs:/runs" -u "$(id -u)" gammaslim prune --output /runs/demo
#
# It runs as any user, on a read-only root file system with a writable /tmp (--read-only --tmpfs /tmp),
# without capabilities and without a network. On SIGTERM (docker stop -t 60) it saves and ends with 75;
# the same command resumes. Other bases: --build-arg BASE_IMAGE=ubuntu:24.04, or any Debian or Ubuntu
# that contains or packages Python 3.11 or newer. Versions: .docker/requirements.txt.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1


# Shared by the build stage and the final stage: Python, certificates, the user.
# Ubuntu keeps one version of a package, so only the base can be pinned.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS python
# hadolint ignore=DL3008
RUN if ! command -v python3 || [ ! -e /etc/ssl/certs/ca-certificates.crt ]; then \
      apt-get update \
      && apt-get install -y --no-install-recommends ca-certificates python3 \
      && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /tmp \
      --shell /usr/sbin/nologin gammaslim


# Build /opt/venv, without pip or a compiler, and /code, which is copied over it.
FROM python AS build
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ensurepip'; then \
      apt-get update \
      && apt-get install -y --no-install-recommends python3-venv \
      && rm -rf /var/lib/apt/lists/*; \
    fi
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
COPY .docker/requirements.txt /build/
# Compile to bytecode here, since the folder is read-only later; unchecked-hash skips the comparison
# with the sources. Nobody imports the tests of other packages; one of torch's own needs the syntax
# of Python 3.12.
# The headers are only for C++ extensions, and the image has no compiler.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --no-compile --no-deps --require-hashes \
      --requirement /build/requirements.txt \
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/include \
      /opt/venv/lib/python3*/site-packages/nvidia/*/include \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash \
      -x '/tests/|py312_intrinsics' /opt/venv/lib
COPY LICENSE README.md pyproject.toml /build/
COPY job /build/job
RUN /opt/pip/bin/pip --python /opt/venv/bin/python install --no-compile --no-deps \
      --no-build-isolation --no-index --root /code /build \
    && python3 -m compileall -q -s /code --invalidation-mode unchecked-hash /code


FROM python
ARG REVISION=unknown
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="gammaslim" \
      org.opencontainers.image.description="Makes trained CNNs smaller and faster: slimming by BatchNorm γ" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# USER and LOGNAME serve programs that ask for a name under a user id without a passwd entry.
# WANDB_DIR stays unset: an offline W&B run belongs in the run directory, which outlives the container.
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/tmp \
    USER=gammaslim \
    LOGNAME=gammaslim \
    XDG_CACHE_HOME=/tmp/.cache \
    HF_HOME=/tmp/.cache/huggingface \
    MPLCONFIGDIR=/tmp/.cache/matplotlib \
    TORCH_HOME=/tmp/.cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/tmp/.cache/inductor \
    TRITON_CACHE_DIR=/tmp/.cache/triton \
    WANDB_CACHE_DIR=/tmp/.cache/wandb \
    WANDB_CONFIG_DIR=/tmp/.config/wandb \
    WANDB_ARTIFACT_DIR=/tmp/artifacts \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
# The large layer that seldom changes comes first: a new version of the job is a layer of 7 MB.
COPY --from=build /opt/venv /opt/venv
COPY --from=build /code /
WORKDIR /tmp
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["gammaslim"]
# the demonstration; -v "$PWD/runs:/runs" and --output /runs/demo keep its files
CMD ["prune", "--output", "/tmp/runs/demo"]
