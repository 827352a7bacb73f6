# torch as the stable ABI needs it: headers and libraries by path. find_package(Torch) would also
# ask for cuBLAS, cuDNN and the rest of the CUDA toolkit, of which nothing here is used.
function(add_torch_target name)
  add_library(${name} INTERFACE)
  target_include_directories(${name} SYSTEM INTERFACE ${FUSEFEAT_TORCH_DIR}/include)
  target_compile_definitions(${name} INTERFACE TORCH_TARGET_VERSION=${FUSEFEAT_TORCH_TARGET})
  foreach(library IN LISTS ARGN)
    target_link_libraries(${name} INTERFACE ${FUSEFEAT_TORCH_DIR}/lib/lib${library}.so)
  endforeach()
endfunction()

add_torch_target(torch_stable torch_cpu c10)
add_torch_target(torch_stable_cuda torch_cpu torch_cuda c10)
