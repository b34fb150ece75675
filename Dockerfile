# mergelab in a container.
#
#   docker build -t mergelab .
#   docker run --rm -v "$PWD:/work" mergelab method=ties task=rte
#
# With CUDA, for a machine with the NVIDIA container toolkit:
#   docker build -t mergelab:cuda --build-arg TORCH=cu126 .
#   docker run --rm --gpus all -v "$PWD:/work" mergelab:cuda method=ties task=rte device=cuda
FROM python:3.11-slim

# cpu, or a CUDA version of PyTorch's package index such as cu126.
ARG TORCH=cpu
# Extras, such as [joblib,peft,postgres].
ARG EXTRAS=

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mergelab
COPY constraints.txt pyproject.toml README.md LICENSE ./
# The CPU's or CUDA's build of the version in constraints.txt.
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" \
        "$(grep '^torch==' constraints.txt)"
COPY mergelab mergelab
COPY hydra_plugins hydra_plugins
COPY conf conf
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt ".${EXTRAS}"

# Runs, caches and models are written below the mounted folder, by its owner with `docker run --user`.
ENV HF_HOME=/work/.cache/huggingface MERGELAB_CACHE=/work/.cache/mergelab HOME=/tmp
WORKDIR /work
ENTRYPOINT ["mergelab"]
CMD ["--help"]
