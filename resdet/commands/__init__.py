"""The subcommands of ``resdet``, one file each."""
