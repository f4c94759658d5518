# The program on NVIDIA GPUs: NVIDIA's PyTorch image, with Horovod over NCCL and MPI on top.
#
#   docker build -t gradient-compression-trainer .
#   docker run --rm --gpus all --ipc host -v /data/imagenet:/data:ro -v "$PWD/runs:/runs" gradient-compression-trainer \
#     torchrun --nproc_per_node 8 main.py /data --workspace /runs --compression-type maxmin
#
# Why this base, and not a CUDA image with wheels: it has apex, whose FusedSGD steps the optimizer and which has no wheels,
# an NCCL and an MPI that were built for each other, and torch 2.13 with Triton 3.7.1, the versions of requirements.txt.
#
# The checks of this repository have no docker daemon, so none of them builds this file. Outside of it, Horovod's CUDA,
# NCCL and MPI sources passed the compiler, not the linker, with CUDA 13.3, NCCL 2.32, Open MPI 4.1 and torch 2.13.
FROM nvcr.io/nvidia/pytorch:26.07-py3

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Our pins go into an environment that sees the image's packages and replaces none of them. The image's own constraints
# would refuse the pins. It needs no pip of its own: the image's serves.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv --system-site-packages --without-pip "$VIRTUAL_ENV"

WORKDIR /opt/gradient-compression-trainer

# torch, torchvision and DALI are the image's: what it was built with fits its CUDA.
COPY requirements.txt ./
COPY tests/requirements.txt tests/
RUN grep -vE '^(torch|torchvision|nvidia-dali)' requirements.txt > /tmp/requirements.txt \
    && python -m pip install -r /tmp/requirements.txt -r tests/requirements.txt \
    && rm /tmp/requirements.txt

# Compiled without a GPU, for every architecture that the image's nvcc knows. It shares libnccl.so with torch.
COPY build_horovod build_horovod
RUN HOROVOD_WITH_MPI=1 HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED XDG_CACHE_HOME=/tmp/cache \
    build_horovod/install.sh python \
    && rm -r /tmp/cache \
    && horovodrun --check-build

COPY . .
CMD ["python", "main.py", "--help"]
