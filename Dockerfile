# The image that launch/gke-jobset.yaml runs. EXTRA is tpu or gpu:
#   docker build --build-arg EXTRA=tpu --tag REGION-docker.pkg.dev/PROJECT/siglip/siglip:latest . && docker push …
FROM python:3.11-slim
ARG EXTRA=tpu
# The language detector of `data curate` is compiled.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /siglip
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY siglip siglip
COPY data_pipelines data_pipelines
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[$EXTRA]"
# Where GKE puts the driver's libraries on GPU nodes; CUDA itself comes with jax.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64
# The pod's command names siglip itself: with a shell in between SIGTERM would not reach it.
CMD ["siglip", "--help"]
