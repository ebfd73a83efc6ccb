//! The imperative shell: thin, timed-out, idempotent effects. Everything that talks to Kubernetes or Prometheus is here.
