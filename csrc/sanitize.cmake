# GPTCORE_SANITIZE=address: _C under AddressSanitizer and UndefinedBehaviorSanitizer; a failure ends the process.
# A build type of its own, since the options of Release would follow and win. Two instruction sets, which between
# them take every branch of the bodies but AMX's; .ci/sanitize runs them.
set(CMAKE_BUILD_TYPE Sanitize)
if(NOT GPTCORE_ISAS)
  set(GPTCORE_ISAS v3 v4_bf16)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(GPTCORE_ISAS v2)
  endif()
endif()
if(NOT GPTCORE_SANITIZE STREQUAL "address")
  message(FATAL_ERROR "GPTCORE_SANITIZE: got '${GPTCORE_SANITIZE}', expected address or OFF")
endif()
set(GPTCORE_SANITIZERS -fsanitize=address,undefined -fno-sanitize-recover=all)
add_compile_options(-O1 -g1 -fno-omit-frame-pointer ${GPTCORE_SANITIZERS})
add_link_options(${GPTCORE_SANITIZERS})
