"""One process of a run over 8 devices: joins the others, then does pod_work, whose imports ask jax for devices."""

from absl import flags

from distillspec_jax import cli

flags.DEFINE_enum("do", "train", ["train", "restore"], "What to do.")
flags.DEFINE_string("out", None, "Where results go.")
flags.DEFINE_string("directory", None, "The run's directory.")
flags.DEFINE_list("mesh", ["2", "2", "2"], "data, fsdp, model.")
flags.DEFINE_integer("steps", 6, "Updates in all.")
flags.DEFINE_string("method", "distillspec", "Of distillation.")
cli.define_process_flags()


def main(argv):
  del argv
  cli.join()
  import pod_work  # noqa: PLC0415

  pod_work.main(flags.FLAGS)


if __name__ == "__main__":
  cli.run(main)
