#!/usr/bin/env bash
# mpirun as the tests need it: as root too, more ranks than cores, no binding, one machine.  MPIRUN names another MPI's;
# what the variables say concerns Open MPI alone.
# usage: mpirun.sh -n RANKS PROGRAM [ARGS]
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_btl=vader,self OMPI_MCA_pml=ob1 OMPI_MCA_btl_vader_single_copy_mechanism=none
exec "${MPIRUN:-mpirun}" "$@"
