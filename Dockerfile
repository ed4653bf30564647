# What a pod runs: Python, the packages of pyproject.toml, and the project. docs/kubernetes.md says how it is used.
FROM python:3.11-slim

RUN pip install --no-cache-dir uv==0.13.9

# the wheels of torch carry CUDA and run without a GPU too; --build-arg UV_TORCH_BACKEND=cpu makes a smaller image
ARG UV_TORCH_BACKEND
ENV UV_LINK_MODE=copy UV_SYSTEM_PYTHON=1

# where MLflow has projects in an image
WORKDIR /mlflow/projects/code

# packages before code, so that a change of code does not install them again
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirements pyproject.toml --extra huggingface --extra onnx --extra umap

COPY . .
RUN uv pip install --no-cache --no-deps --editable .

# the output folder is the only one that the user may write to; a volume takes its place
RUN useradd --uid 1000 --create-home trainer \
    && install --directory --owner=trainer --group=trainer outputs
USER 1000

# git is not in the image: MLflow's launcher has put the commit into the run
ENV GIT_PYTHON_REFRESH=quiet \
    NO_ALBUMENTATIONS_UPDATE=1 \
    PYTHONUNBUFFERED=1

# no ENTRYPOINT: MLflow gives the whole command
CMD ["python", "-m", "mlflow_ssl", "--help"]
