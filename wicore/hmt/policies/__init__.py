"""Cache replacement policies, one a module; `wicore.hmt.policy` names them all."""
