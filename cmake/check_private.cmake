# Code compiled for an instruction set must stay private to its object file. A weak function (an inline
# function or a template instance) is merged at link time with its twins from other objects, and the copy that
# stays may hold instructions the machine lacks.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --demangle ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [Wu] [^\n]*" weak "${symbols}")
  if(weak)
    list(JOIN weak "\n  " weak)
    message(FATAL_ERROR "${object} holds functions that the linker may merge with other builds of them:\n  ${weak}")
  endif()
endforeach()
