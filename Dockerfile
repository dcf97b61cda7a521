# The environment with CUDA, and a copy of the project for where no workspace is mounted (docs/cluster.md).
#   docker build -t bev-distillery .                                        # for the GPUs in TORCH_CUDA_ARCH_LIST
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/workspace" -u "$(id -u)" bev-distillery run
# torch's wheel brings its own CUDA libraries; the toolkit of the base image compiles mmcv's ops, and must be of the
# same major version: the build says so when it is not.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ git make python3.12 python3.12-dev python3.12-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory '*'

ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# As setup/setup.sh does it: torch with what it depends on, then the lock, which is complete, then mmcv and a
# sparse convolution.
WORKDIR /opt/setup
COPY setup/requirements.txt ./
RUN python3.12 -m venv /opt/venv \
    && pip install -c requirements.txt torch numpy setuptools wheel ninja psutil packaging
RUN pip install --no-deps -r requirements.txt

ARG TORCH_CUDA_ARCH_LIST="8.0 8.6 8.9 9.0"
# The machine that builds the image may have no GPU.
ARG FORCE_CUDA=1
COPY setup/machine.py setup/build_mmcv.py setup/sparse_convolution.py setup/spconv_on_triton.py setup/check.py ./
RUN python -c "import torch; assert torch.version.cuda, 'this torch has no CUDA: which package index was used?'" \
    && TORCH_CUDA_ARCH_LIST="$TORCH_CUDA_ARCH_LIST" python build_mmcv.py /opt/wheels \
    && pip install --no-deps --force-reinstall /opt/wheels/*/mmcv-*.whl \
    && rm -r /opt/wheels \
    && python sparse_convolution.py \
    && python check.py

RUN useradd --create-home --uid 10001 distillery \
    && install -d -o distillery /workspace
USER distillery
WORKDIR /workspace
COPY --chown=distillery . .
RUN git init -q && python -m pipeline track init

ENTRYPOINT ["tini", "--", "python", "-m", "pipeline"]
CMD ["--help"]
